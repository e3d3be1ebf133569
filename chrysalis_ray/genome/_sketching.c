/* The compiled kernel of sketches, as Python calls it (`native.py`). An installation without a compiler goes without; a test
   holds each function to the arrays it stands for. Work is done without the interpreter's lock; what is handed in is checked
   before, so that numbers, places and room fit one another. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_sketching.h"

#define VERSION 1 /* as in `native.py` */

typedef struct {
    Py_buffer view;
    size_t count;
} Numbers;

/* Gets at a buffer of numbers of so many bytes, or, of a call that fails later, lets it go: a converter of `PyArg_ParseTuple`. */
static int take(PyObject *given, Numbers *numbers, int flags, size_t bytes)
{
    if (given && PyObject_GetBuffer(given, &numbers->view, flags))
        return 0;
    numbers->count = (size_t)numbers->view.len / bytes;
    if (given && (size_t)numbers->view.len % bytes == 0 && (uintptr_t)numbers->view.buf % bytes == 0)
        return Py_CLEANUP_SUPPORTED;
    if (given)
        PyErr_SetString(PyExc_ValueError, "a buffer of other numbers, or one that lies askew");
    PyBuffer_Release(&numbers->view);
    return 0;
}

static int longs(PyObject *given, void *numbers) { return take(given, numbers, PyBUF_SIMPLE, 8); }
static int own_longs(PyObject *given, void *numbers) { return take(given, numbers, PyBUF_WRITABLE, 8); }
static int own_ints(PyObject *given, void *numbers) { return take(given, numbers, PyBUF_WRITABLE, 4); }

static PyObject *answer(int fits, size_t count)
{
    if (fits)
        return PyLong_FromSize_t(count);
    PyErr_SetString(PyExc_ValueError, "numbers, places or room that do not fit one another");
    return NULL;
}

/* Whether numbers ascend from at least 0 to at most `last`. */
static int ascend(const int64_t *numbers, size_t count, size_t last)
{
    int64_t before = 0;
    for (size_t i = 0; i < count; before = numbers[i++])
        if (numbers[i] < before)
            return 0;
    return (uint64_t)before <= last;
}

/* Bytes, or text of ASCII as it lies in memory. */
static int read_text(PyObject *item, Text *text)
{
    Py_ssize_t size = 0;
    const char *bytes = NULL;
    if (PyBytes_Check(item)) {
        bytes = PyBytes_AS_STRING(item);
        size = PyBytes_GET_SIZE(item);
    } else if (PyUnicode_Check(item) && PyUnicode_IS_ASCII(item))
        bytes = PyUnicode_AsUTF8AndSize(item, &size);
    else
        PyErr_SetString(PyExc_TypeError, "a text is neither bytes nor a str of ASCII");
    *text = (Text){(const uint8_t *)bytes, (size_t)size};
    return bytes != NULL;
}

static PyObject *py_shingles(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *given;
    unsigned long long one_in;
    Numbers room;
    if (!PyArg_ParseTuple(arguments, "O!KO&", &PyTuple_Type, &given, &one_in, own_longs, &room))
        return NULL;
    size_t count = (size_t)PyTuple_GET_SIZE(given), words = 0, number = 0;
    uint64_t *kept = room.view.buf;
    Text *texts = PyMem_Calloc(count + 1, sizeof *texts);
    if (!texts)
        PyErr_NoMemory();
    for (; texts && number < count && read_text(PyTuple_GET_ITEM(given, (Py_ssize_t)number), texts + number); number++)
        words += texts[number].size / 2 + 1;
    int read = texts && number == count, fits = count <= 1 << (64 - HASH_BITS) && words < room.count;
    if (read && fits) {
        Py_BEGIN_ALLOW_THREADS
        for (number = 0; number < count; number++)
            kept = shingles_of(texts[number], (uint64_t)number << HASH_BITS, one_in - 1, kept);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(texts);
    PyBuffer_Release(&room.view);
    return read ? answer(fits, (size_t)(kept - (uint64_t *)room.view.buf)) : NULL;
}

static PyObject *py_settle(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Numbers owned, sizes;
    size_t left;
    if (!PyArg_ParseTuple(arguments, "O&O&", own_longs, &owned, own_longs, &sizes))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    left = settled(owned.view.buf, owned.count, sizes.view.buf, sizes.count);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&owned.view);
    PyBuffer_Release(&sizes.view);
    return answer(left <= owned.count, left);
}

static PyObject *py_sign(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Numbers hashes, offsets, cells;
    if (!PyArg_ParseTuple(arguments, "O&O&O&", longs, &hashes, longs, &offsets, own_ints, &cells))
        return NULL;
    const int64_t *at = offsets.view.buf;
    size_t texts = cells.count / BINS;
    int fits = offsets.count == texts + 1 && ascend(at, offsets.count, hashes.count);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (size_t text = 0; text < texts; text++)
            sign((const uint64_t *)hashes.view.buf + at[text], (size_t)(at[text + 1] - at[text]),
                 (uint32_t *)cells.view.buf + text * BINS);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&hashes.view);
    PyBuffer_Release(&offsets.view);
    PyBuffer_Release(&cells.view);
    return answer(fits, texts);
}

static PyObject *py_own(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Numbers piece, offsets, packed, sizes;
    unsigned long long owner, coarse;
    unsigned owner_bits;
    if (!PyArg_ParseTuple(arguments, "O&O&KKIO&O&", longs, &piece, longs, &offsets, &owner, &coarse, &owner_bits, own_longs,
                          &packed, own_longs, &sizes))
        return NULL;
    uint64_t *end = packed.view.buf;
    int fits = offsets.count == sizes.count + 1 && ascend(offsets.view.buf, offsets.count, piece.count) &&
               packed.count > piece.count && owner_bits >= 64 - HASH_BITS && owner_bits < 64;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        end = own(piece.view.buf, offsets.view.buf, sizes.count, owner, coarse, owner_bits, end, sizes.view.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&piece.view);
    PyBuffer_Release(&offsets.view);
    PyBuffer_Release(&packed.view);
    PyBuffer_Release(&sizes.view);
    return answer(fits, (size_t)(end - (uint64_t *)packed.view.buf));
}

static PyObject *py_meetings(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Numbers packed, sources, pairs;
    unsigned owner_bits, most;
    if (!PyArg_ParseTuple(arguments, "O&IIO&O&", longs, &packed, &owner_bits, &most, longs, &sources, own_longs, &pairs))
        return NULL;
    int64_t *begin = pairs.view.buf, *end = NULL;
    if (owner_bits < 64 && most && pairs.count / most > packed.count / 2 + 1) {
        Py_BEGIN_ALLOW_THREADS
        end = meetings(packed.view.buf, packed.count, owner_bits, most, sources.view.buf, sources.count, begin);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&packed.view);
    PyBuffer_Release(&sources.view);
    PyBuffer_Release(&pairs.view);
    return answer(end != NULL, end ? (size_t)(end - begin) : 0);
}

static PyObject *py_common(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Numbers one, other;
    if (!PyArg_ParseTuple(arguments, "O&O&", longs, &one, longs, &other))
        return NULL;
    size_t both = common(one.view.buf, one.count, other.view.buf, other.count);
    PyBuffer_Release(&one.view);
    PyBuffer_Release(&other.view);
    return answer(1, both);
}

static PyMethodDef functions[] = {
    {"shingles", py_shingles, METH_VARARGS, NULL}, {"settle", py_settle, METH_VARARGS, NULL},
    {"sign", py_sign, METH_VARARGS, NULL},         {"own", py_own, METH_VARARGS, NULL},
    {"meetings", py_meetings, METH_VARARGS, NULL}, {"common", py_common, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_sketching", .m_size = 0, .m_methods = functions};

PyMODINIT_FUNC PyInit__sketching(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "VERSION", VERSION) < 0)
        Py_CLEAR(made);
    return made;
}
