/* Sketches of texts: what `shingles.py`, `similarity.py` and `splits.py` do in arrays, equal to the bit, several times as fast.

   Texts are foreign bytes: nothing here trusts what they hold, and no pointer leaves what it was given the size of. */

#include <stdint.h>
#include <string.h>

#define SHINGLE_WORDS 5
#define HASH_BITS 48
#define BINS 112
#define DRAWS 64
#define EMPTY UINT32_MAX
#define GOLDEN UINT64_C(0x9E3779B97F4A7C15)
#define MIXER UINT64_C(0xBF58476D1CE4E5B9)
#define TAIL UINT64_C(0x94D049BB133111EB)
#define BASE UINT64_C(0xD6E8FEB86659FD93)
#define AT_ONCE 1024 /* bytes of a text, a multiple of 64 */
#define IN_EVERY_BYTE UINT64_C(0x0101010101010101)

typedef struct {
    const uint8_t *bytes;
    size_t size;
} Text;

/* words ----------------------------------------------------------------------------------------------------------- */

/* Eight bytes, the first lowest: what compilers make one load of. */
static inline uint64_t loaded(const uint8_t *b)
{
    return (uint64_t)b[0] | (uint64_t)b[1] << 8 | (uint64_t)b[2] << 16 | (uint64_t)b[3] << 24 | (uint64_t)b[4] << 32 |
           (uint64_t)b[5] << 40 | (uint64_t)b[6] << 48 | (uint64_t)b[7] << 56;
}

/* The eight bytes of a text from `at` on; zeros beyond its end. */
static inline uint64_t eight_bytes(Text text, size_t at)
{
    if (text.size - at >= 8)
        return loaded(text.bytes + at);
    uint8_t last[8] = {0};
    memcpy(last, text.bytes + at, text.size - at);
    return loaded(last);
}

/* Eight bytes of a word with ASCII letters in lower case. Of what may stand in a word only capitals and `_` have bit 6 and
   neither bit 5 nor bit 7, and `_` is the one that one more gives bit 5. */
static inline uint64_t lower(uint64_t word)
{
    uint64_t next = (word & 0x7F * IN_EVERY_BYTE) + IN_EVERY_BYTE;
    return word | (word >> 1 & ~(word >> 2) & ~next & 0x20 * IN_EVERY_BYTE);
}

static inline uint64_t word_hash(Text text, size_t begin, size_t end)
{
    size_t length = end - begin;
    uint64_t hash = lower(eight_bytes(text, begin) & ~UINT64_C(0) >> (length < 8 ? 64 - 8 * length : 0));
    if (length > 8) {
        uint64_t tail = lower(eight_bytes(text, end - 8));
        if (length > 16)
            tail += lower(eight_bytes(text, begin + 8)) * GOLDEN;
        tail += length * MIXER;
        hash ^= (tail ^ tail >> 29) * TAIL;
    }
    hash *= GOLDEN;
    return hash ^ hash >> 32;
}

/* Bit i says whether byte i of 64 stands in a word. The first loop is one that compilers make vectors of; the second takes the
   lowest bit of eight bytes to one byte. */
static inline uint64_t in_words(const uint8_t *bytes)
{
    uint8_t inside[64];
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++) {
        uint8_t byte = bytes[i], letter = (uint8_t)((byte | 0x20) - 'a'), digit = (uint8_t)(byte - '0');
        inside[i] = (uint8_t)((letter < 26) | (digit < 10) | (byte == '_') | (byte > 127));
    }
    for (int i = 0; i < 64; i += 8)
        bits |= loaded(inside + i) * UINT64_C(0x0102040810204080) >> 56 << i;
    return bits;
}

/* Where words begin and end, in turn, in the 64 bytes from `at` on. `before`: whether the byte before stands in one. */
static inline size_t *edges_of(Text text, size_t at, uint64_t *before, size_t *edges)
{
    uint8_t last[64] = {0};
    if (text.size - at < 64)
        memcpy(last, text.bytes + at, text.size - at);
    uint64_t inside = in_words(text.size - at < 64 ? last : text.bytes + at), changes = inside ^ (inside << 1 | *before);
    *before = inside >> 63;
    for (; changes; changes &= changes - 1)
        *edges++ = at + (size_t)__builtin_ctzll(changes);
    return edges;
}

/* The kept runs of words of one text, each with `owner` above it, written from `kept` on; where they end. There must be room for
   one more than there are words. */
static uint64_t *shingles_of(Text text, uint64_t owner, uint64_t left_out, uint64_t *kept)
{
    size_t edges[AT_ONCE + 2], *edge = edges;
    uint64_t words[SHINGLE_WORDS - 1 + AT_ONCE / 2 + 1], *word = words, before = 0;
    for (size_t begin = 0; begin < text.size; begin += AT_ONCE) {
        size_t end = text.size - begin < AT_ONCE ? text.size : begin + AT_ONCE, *next = edges;
        for (size_t at = begin; at < end; at += 64)
            edge = edges_of(text, at, &before, edge);
        if (end == text.size && before)
            *edge++ = end;
        for (; edge - next >= 2; next += 2)
            *word++ = word_hash(text, next[0], next[1]);
        if (next < edge)
            edges[0] = *next; /* a word that goes on */
        edge = edges + (edge - next);
        uint64_t *run = words;
        for (; word - run >= SHINGLE_WORDS; run++) {
            uint64_t mixed = (((run[0] * BASE + run[1]) * BASE + run[2]) * BASE + run[3]) * BASE + run[4];
            mixed = (mixed ^ mixed >> 32) * MIXER;
            mixed = (mixed ^ mixed >> 29) >> (64 - HASH_BITS);
            *kept = owner | mixed;
            kept += !(mixed & left_out);
        }
        memmove(words, run, (size_t)(word - run) * sizeof *words);
        word = words + (word - run);
    }
    return kept;
}

/* Of sorted shingles with their texts' numbers above them: each once, without the number, in place; how many each text has.
   Returns how many are left, or more than there were where some are of none of the texts. */
static size_t settled(uint64_t *owned, size_t count, int64_t *sizes, size_t texts)
{
    size_t left = 0, i = 0;
    for (size_t text = 0; text < texts; text++) {
        size_t first = left;
        for (; i < count && owned[i] >> HASH_BITS == text; i++) {
            uint64_t one = owned[i];
            owned[left] = one & ((UINT64_C(1) << HASH_BITS) - 1);
            left += i + 1 == count || owned[i + 1] != one;
        }
        sizes[text] = (int64_t)(left - first);
    }
    return i == count ? left : count + 1;
}

/* signatures ------------------------------------------------------------------------------------------------------ */

/* The bin that an empty one asks at its `draw`: drawn alike for all texts, in the end its neighbours in turn. */
static inline size_t donor(size_t draw, size_t column)
{
    if (draw >= DRAWS)
        return (column + draw) % BINS;
    uint64_t drawn = (draw * BINS + column + 1) * GOLDEN;
    drawn = (drawn ^ drawn >> 30) * MIXER;
    drawn = (drawn ^ drawn >> 27) * TAIL;
    return (drawn >> 33) % BINS;
}

/* Of the `count` ascending `hashes` of one text the least of every bin; an empty bin borrows from one that is not. */
static void sign(const uint64_t *hashes, size_t count, uint32_t *signature)
{
    uint32_t least[BINS];
    memset(least, 0xFF, sizeof least);
    for (size_t i = count; i-- > 0;)
        least[(hashes[i] >> (HASH_BITS - 32) & EMPTY) * BINS >> 32] = (uint32_t)hashes[i];
    for (size_t column = 0; column < BINS; column++) {
        size_t asked = column;
        for (size_t draw = 0; count && least[asked] == EMPTY && draw < DRAWS + BINS; draw++)
            asked = donor(draw, column);
        signature[column] = least[asked];
    }
}

/* kinship --------------------------------------------------------------------------------------------------------- */

/* Of a piece of all shingles those without a bit of `coarse`, less their lowest bits, over the number of their text. `offsets`,
   from 0 to the end of the piece, part it into those of `texts` texts, numbered from `owner` on; `sizes` grow by what they keep. */
static uint64_t *own(const uint64_t *piece, const int64_t *offsets, size_t texts, uint64_t owner, uint64_t coarse,
                     unsigned owner_bits, uint64_t *packed, int64_t *sizes)
{
    for (size_t text = 0; text < texts; text++, owner++) {
        uint64_t *first = packed;
        for (int64_t i = offsets[text]; i < offsets[text + 1]; i++) {
            *packed = piece[i] >> (owner_bits - (64 - HASH_BITS)) << owner_bits | owner;
            packed += !(piece[i] & coarse);
        }
        sizes[text] += packed - first;
    }
    return packed;
}

/* Pairs of documents of different `sources`, as left x documents + right, once for every shingle of `packed`, which ascends, that
   both hold and at most `most` do. Returns where they end, NULL where a document is not there. */
static int64_t *meetings(const uint64_t *packed, size_t count, unsigned owner_bits, size_t most, const int64_t *sources,
                         uint64_t documents, int64_t *pair)
{
    const uint64_t owner = (UINT64_C(1) << owner_bits) - 1;
    for (size_t begin = 0, end; begin < count; begin = end) {
        for (end = begin + 1; end < count && (packed[end] ^ packed[begin]) <= owner;)
            end++;
        if (end - begin < 2 || end - begin > most)
            continue;
        for (size_t i = begin; i < end; i++)
            for (size_t j = i; ++j < end;) {
                uint64_t left = packed[i] & owner, right = packed[j] & owner;
                if (left >= documents || right >= documents)
                    return NULL;
                *pair = (int64_t)(left * documents + right);
                pair += sources[left] != sources[right];
            }
    }
    return pair;
}

/* How many numbers two lists have in common, each ascending and distinct. */
static size_t common(const uint64_t *one, size_t ones, const uint64_t *other, size_t others)
{
    size_t both = 0;
    for (size_t i = 0, j = 0; i < ones && j < others;) {
        uint64_t a = one[i], b = other[j];
        both += a == b;
        i += a <= b;
        j += b <= a;
    }
    return both;
}
