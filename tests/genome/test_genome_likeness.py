"""Who is a near-duplicate is decided by all shingles where half of them leave it in doubt; and genomes of before that."""

from hypothesis import given, settings
from hypothesis import strategies as st
from test_genome_marks import build, pair_of_similarity, shingle_set, words

from chrysalis_ray.core.records import read_json, sha256_of, write_json
from chrysalis_ray.genome.build import open_genome, verify_genome
from chrysalis_ray.genome.similarity import NEAR_DUPLICATE, WholeTexts, candidate_pairs, in_doubt, similar_pairs, sketch


def test_near_the_threshold_all_shingles_decide_and_far_from_it_the_kept_ones_do():
    """Pairs of a few hundred shingles just above and just below 0.8: by half of their shingles, one in three was misjudged."""
    texts, exact = [], []
    for number, wanted in enumerate([0.81, 0.79, 0.84, 0.76, 0.95, 0.6] * 20):
        one, two = pair_of_similarity(number, wanted)
        a, b = shingle_set(one), shingle_set(two)
        exact.append(len(a & b) / len(a | b))
        texts += [" ".join(one), " ".join(two)]
    sketches, asked = sketch(texts), []
    whole = WholeTexts(lambda number: asked.append(number) or texts[number])
    found = {left // 2: similarity for left, _, similarity in similar_pairs(sketches, NEAR_DUPLICATE, whole=whole)}
    candidates = {left // 2 for left, _ in candidate_pairs(sketches)}
    assert set(found) == {n for n in candidates if exact[n] >= NEAR_DUPLICATE}
    assert all(found[n] == exact[n] for n in found if n % 6 == 0)
    assert {number // 2 % 6 for number in asked} <= {0, 1, 2, 3}
    assert len(asked) == len(set(asked))  # each text is looked through once
    sampled = {left // 2 for left, _, _ in similar_pairs(sketches, NEAR_DUPLICATE)}
    assert len(sampled ^ set(found)) > 5


@given(st.integers(2, 20), st.floats(0.55, 0.97))
@settings(max_examples=40)
def test_who_is_a_near_duplicate_does_not_depend_on_which_shingles_were_kept(number, wanted):
    one, two = (" ".join(tokens) for tokens in pair_of_similarity(number, wanted))
    sketches = sketch([one, two])
    whole = WholeTexts([one, two].__getitem__)
    a, b = shingle_set(one.split()), shingle_set(two.split())
    assert whole.jaccard(0, 1) == len(a & b) / len(a | b)
    assert abs(sketches.jaccard(0, 1) - whole.jaccard(0, 1)) < in_doubt(int(sketches.sizes.sum())) * 4 / 3
    for _, _, similarity in similar_pairs(sketches, NEAR_DUPLICATE, whole=whole):
        assert (similarity >= NEAR_DUPLICATE) == (len(a & b) >= NEAR_DUPLICATE * len(a | b))


def test_a_genome_of_the_kinship_before_is_opened_and_verified_as_it_is_and_built_anew(tmp_path):
    """Its recipe does not say how kinship was found: what it sealed stays, and who builds it again gets the rules of now."""
    (tmp_path / "notes").mkdir()
    for number in range(30):
        (tmp_path / "notes" / f"{number}.txt").write_text(" ".join(words(number, 200)))
    genome = build(tmp_path)
    manifest = read_json(tmp_path / "g" / "manifest.json")
    content = manifest["content"]
    assert content["recipe"].pop("kinship") == 2
    content["recipe_sha256"] = sha256_of(content["recipe"])
    write_json(tmp_path / "g" / "manifest.json", {**manifest, "genome_id": sha256_of(content)})
    old = verify_genome(tmp_path / "g")
    assert old.genome_id == open_genome(tmp_path / "g").genome_id == sha256_of(content) != genome.genome_id
    assert build(tmp_path).genome_id == genome.genome_id
