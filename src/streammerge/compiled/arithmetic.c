/* Arithmetic on long rows of numbers: what numpy and torch do in several operations, in one way through the memory.

   Every function makes the bits of the operations that it stands for. So products are rounded before they are added:
   compile with -ffp-contract=off. Nothing here allocates, keeps state, or reads outside what its arguments say. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VERSION 1 /* as in library.py: another number, and the library is not used */

/* One copy of a function for each set of vector instructions; the loader of the system chooses. */
#ifdef STREAMMERGE_CLONES
#define CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define CLONES
#endif

enum { F64, F32, BF16, F16 };

/* Numbers in files may lie at any address, and are bytes there. */
#define LOOSE __attribute__((aligned(1), may_alias))
typedef double LOOSE loose_double;
typedef float LOOSE loose_float;
typedef uint16_t LOOSE loose_half;
typedef double LOOSE quad __attribute__((vector_size(32)));
typedef float LOOSE octet __attribute__((vector_size(32)));

static const int64_t SIZES[] = {8, 4, 2, 2};

int32_t streammerge_version(void) { return VERSION; }

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* ---- numbers into float32 and float64 ---- */

/* A half's exponent is 112 less than a float's. A subnormal half is an integer times 2^-24. */
static inline float of_half(uint16_t half) {
    uint32_t magnitude = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t normal = (magnitude << 13) + (112u << 23);
    uint32_t infinite = normal + (112u << 23);
    uint32_t subnormal = as_bits((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t bits = magnitude < 0x400 ? subnormal : magnitude < 0x7c00 ? normal : infinite;
    return as_float(bits | sign);
}

static inline float of_bf16(uint16_t half) { return as_float((uint32_t)half << 16); }

static inline float same(float value) { return value; }

/* Loads numbers of a type by way of float32, in which all are exact. */
#define LOAD(NAME, FROM, TO, CONVERT)                                                                              \
    CLONES static void NAME(const FROM *restrict in, TO *restrict out, int64_t elems) {                            \
        for (int64_t i = 0; i < elems; i++) out[i] = CONVERT(in[i]);                                               \
    }

LOAD(load_f32, loose_float, double, same)
LOAD(load_bf16, loose_half, double, of_bf16)
LOAD(load_f16, loose_half, double, of_half)
LOAD(single_bf16, loose_half, float, of_bf16)
LOAD(single_f16, loose_half, float, of_half)

static void load(const void *in, int32_t dtype, int64_t begin, int64_t elems, double *out) {
    const char *from = (const char *)in + begin * SIZES[dtype];
    switch (dtype) {
    case F64: memcpy(out, from, (size_t)elems * sizeof(double)); break;
    case F32: load_f32((const loose_float *)from, out, elems); break;
    case BF16: load_bf16((const loose_half *)from, out, elems); break;
    default: load_f16((const loose_half *)from, out, elems);
    }
}

/* Not for F64. */
static void load_single(const void *in, int32_t dtype, int64_t begin, int64_t elems, float *out) {
    const char *from = (const char *)in + begin * SIZES[dtype];
    switch (dtype) {
    case F32: memcpy(out, from, (size_t)elems * sizeof(float)); break;
    case BF16: single_bf16((const loose_half *)from, out, elems); break;
    default: single_f16((const loose_half *)from, out, elems);
    }
}

/* ---- float64 into numbers, to the nearest, to the even one of two. Each returns whether one is not finite. ---- */

CLONES static int store_f64(const double *restrict in, loose_double *restrict out, int64_t elems) {
    uint64_t most = 0;
    for (int64_t i = 0; i < elems; i++) {
        uint64_t bits;
        memcpy(&bits, in + i, sizeof bits);
        bits &= (uint64_t)0x7fffffff << 32; /* the upper half says it */
        most = bits > most ? bits : most;
        out[i] = in[i];
    }
    return most >= (uint64_t)0x7ff00000 << 32;
}

/* The bits of a bfloat16. */
static inline uint16_t to_bf16(uint32_t bits) { return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); }

/* The bits of a half. Adding half to a float whose last bit is worth 2^-24 rounds to a subnormal one. */
static inline uint16_t to_half(uint32_t bits) {
    uint32_t magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - (126u << 23);
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return (uint16_t)((magnitude < 113u << 23 ? subnormal : normal) | sign);
}

/* The least magnitudes that are rounded to infinity. */
#define INFINITE_BF16 0x7f7f8000
#define INFINITE_HALF 0x477ff000 /* 65520 */

/* Stores numbers of a type that are converted to float32 first. */
#define STORE(NAME, FROM, TO, CONVERT, INFINITE)                                                                   \
    CLONES static int NAME(const FROM *restrict in, TO *restrict out, int64_t elems) {                             \
        uint32_t most = 0;                                                                                         \
        for (int64_t i = 0; i < elems; i++) {                                                                      \
            uint32_t bits = as_bits((float)in[i]), magnitude = bits & 0x7fffffff;                                  \
            most = magnitude > most ? magnitude : most;                                                            \
            out[i] = CONVERT(bits);                                                                                \
        }                                                                                                          \
        return most >= INFINITE;                                                                                   \
    }

STORE(store_f32, double, loose_float, as_float, 0x7f800000)
STORE(store_bf16, double, loose_half, to_bf16, INFINITE_BF16)
STORE(store_f16, double, loose_half, to_half, INFINITE_HALF)
STORE(single_to_f32, float, loose_float, as_float, 0x7f800000)
STORE(single_to_bf16, float, loose_half, to_bf16, INFINITE_BF16)
STORE(single_to_f16, float, loose_half, to_half, INFINITE_HALF)

static int store(const double *in, void *out, int32_t dtype, int64_t begin, int64_t elems) {
    char *into = (char *)out + begin * SIZES[dtype];
    switch (dtype) {
    case F64: return store_f64(in, (loose_double *)into, elems);
    case F32: return store_f32(in, (loose_float *)into, elems);
    case BF16: return store_bf16(in, (loose_half *)into, elems);
    default: return store_f16(in, (loose_half *)into, elems);
    }
}

/* Not for F64. */
static int store_single(const float *in, void *out, int32_t dtype, int64_t begin, int64_t elems) {
    char *into = (char *)out + begin * SIZES[dtype];
    switch (dtype) {
    case F32: return single_to_f32(in, (loose_float *)into, elems);
    case BF16: return single_to_bf16(in, (loose_half *)into, elems);
    default: return single_to_f16(in, (loose_half *)into, elems);
    }
}

/* ---- weighted sums ---- */

CLONES static void begin_1(double *restrict t, const double *restrict a, const double *w, int64_t elems) {
    double u = w[0];
    for (int64_t i = 0; i < elems; i++) t[i] = a[i] * u;
}

CLONES static void begin_2(
    double *restrict t, const double *restrict a, const double *restrict b, const double *w, int64_t elems) {
    double u = w[0], v = w[1];
    for (int64_t i = 0; i < elems; i++) t[i] = a[i] * u + b[i] * v;
}

CLONES static void add_1(double *restrict t, const double *restrict a, const double *w, int64_t elems) {
    double u = w[0];
    for (int64_t i = 0; i < elems; i++) t[i] += a[i] * u;
}

CLONES static void add_2(
    double *restrict t, const double *restrict a, const double *restrict b, const double *w, int64_t elems) {
    double u = w[0], v = w[1];
    for (int64_t i = 0; i < elems; i++) t[i] = t[i] + a[i] * u + b[i] * v;
}

CLONES static void multiply(double *restrict t, double factor, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) t[i] *= factor;
}

CLONES static void divide(double *restrict t, double divisor, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) t[i] /= divisor;
}

/* Writes several weighted sums of the same rows of numbers, each divided by a number.

   weights: outputs x sources. divides: 1 if factors are divisors, 0 if they are multiplied by. tiles: memory for
   (sources + 1) * tile numbers. totals: NULL, or the sums so far of one output, which are added to if continues, and are
   the result if out is NULL. nonfinite: set to 1 for each output that has a number which is not finite, else to 0. */
void streammerge_sums(
    int64_t elems, int32_t sources, const void *const *in, const int32_t *in_dtypes, int32_t outputs,
    const double *weights, const double *factors, const uint8_t *divides, void *const *out, const int32_t *out_dtypes,
    double *tiles, int64_t tile, double *totals, int32_t continues, uint8_t *nonfinite) {
    for (int32_t j = 0; out && j < outputs; j++) nonfinite[j] = 0;
    for (int64_t begin = 0; begin < elems; begin += tile) {
        int64_t n = elems - begin < tile ? elems - begin : tile;
        for (int32_t i = 0; i < sources; i++) load(in[i], in_dtypes[i], begin, n, tiles + i * tile);
        for (int32_t j = 0; j < outputs; j++) {
            const double *w = weights + (int64_t)j * sources;
            double *t = totals ? totals + begin : tiles + sources * tile;
            int32_t i = 0;
            if (!continues && sources >= 2) {
                begin_2(t, tiles, tiles + tile, w, n);
                i = 2;
            } else if (!continues) {
                begin_1(t, tiles, w, n);
                i = 1;
            }
            for (; i + 1 < sources; i += 2) add_2(t, tiles + i * tile, tiles + (i + 1) * tile, w + i, n);
            if (i < sources) add_1(t, tiles + i * tile, w + i, n);
            if (!out) continue;
            if (divides[j]) divide(t, factors[j], n);
            else if (factors[j] != 1) multiply(t, factors[j], n);
            nonfinite[j] |= (uint8_t)store(t, out[j], out_dtypes[j], begin, n);
        }
    }
}

/* ---- sums of many numbers ---- */

/* A sum of numbers is made in this order on every machine: number i is added to the sum i % LANES, which begins with 0.
   Then the upper half of the sums is added to the lower half, until one is left. */
#define LANES 256

/* So many lanes are held in vector registers. */
#define HELD 32

static double joined(double *lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Adds numbers to the lanes, which begin anew if begun is 0. The first belongs to the lane 0. */
CLONES static void add_f64(double *restrict lanes, const loose_double *restrict in, int begun, int64_t elems) {
    int64_t whole = elems / LANES * LANES;
    if (!begun) memset(lanes, 0, LANES * sizeof(double));
    for (int64_t held = 0; whole && held < LANES; held += HELD) {
        quad sums[HELD / 4];
        memcpy(sums, lanes + held, sizeof sums);
        for (int64_t i = 0; i < whole; i += LANES)
            for (int j = 0; j < HELD / 4; j++) sums[j] += *(const quad *)(in + i + held + 4 * j);
        memcpy(lanes + held, sums, sizeof sums);
    }
    for (int64_t i = whole; i < elems; i++) lanes[i - whole] += in[i];
}

/* The same with the products of two rows, each rounded. */
CLONES static void add_products(double *restrict lanes, const double *a, const double *b, int begun, int64_t elems) {
    int64_t whole = elems / LANES * LANES;
    if (!begun) memset(lanes, 0, LANES * sizeof(double));
    for (int64_t held = 0; whole && held < LANES; held += HELD) {
        quad sums[HELD / 4];
        memcpy(sums, lanes + held, sizeof sums);
        for (int64_t i = 0; i < whole; i += LANES)
            for (int j = 0; j < HELD / 4; j++) {
                int64_t at = i + held + 4 * j;
                sums[j] += *(const quad *)(a + at) * *(const quad *)(b + at);
            }
        memcpy(lanes + held, sums, sizeof sums);
    }
    for (int64_t i = whole; i < elems; i++) lanes[i - whole] += a[i] * b[i];
}

CLONES static void subtract(double *restrict a, const double *restrict b, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] -= b[i];
}

/* Numbers that are summed at once: whole rows of lanes, and not a power of two of them. */
#define SUMMED (3 * LANES)

/* Writes the sum of each of several rows, which lie one after the other. */
void streammerge_row_sums(const void *in, int32_t dtype, int64_t rows, int64_t elems, double *out) {
    double tile[SUMMED], lanes[LANES];
    for (int64_t row = 0; row < rows; row++) {
        if (dtype == F64 || !elems) add_f64(lanes, (const loose_double *)in + row * elems, 0, elems);
        else
            for (int64_t begin = 0; begin < elems; begin += SUMMED) {
                int64_t n = elems - begin < SUMMED ? elems - begin : SUMMED;
                load(in, dtype, row * elems + begin, n, tile);
                add_f64(lanes, tile, begin > 0, n);
            }
        out[row] = joined(lanes);
    }
}

/* Adds to totals the sums of the products of all pairs of rows, 00, 10, 11, 20, ..., grain by grain, or begins with them if
   begun is 0. base: NULL, or what is subtracted from each row before. tiles: memory for (sources + 1) * SUMMED numbers, and
   lanes for all pairs. */
void streammerge_products(
    int64_t elems, int32_t sources, const void *const *in, const int32_t *in_dtypes, const void *base, int32_t base_dtype,
    int64_t grain, double *tiles, double *lanes, double *totals, int32_t begun) {
    double *of_base = tiles + sources * SUMMED;
    for (int64_t start = 0; start < elems; start += grain) {
        int64_t stop = elems - start < grain ? elems : start + grain;
        for (int64_t begin = start; begin < stop; begin += SUMMED) {
            int64_t n = stop - begin < SUMMED ? stop - begin : SUMMED, pair = 0;
            if (base) load(base, base_dtype, begin, n, of_base);
            for (int32_t i = 0; i < sources; i++) {
                double *row = tiles + i * SUMMED;
                load(in[i], in_dtypes[i], begin, n, row);
                if (base) subtract(row, of_base, n);
                for (int32_t j = 0; j <= i; j++, pair++) {
                    add_products(lanes + pair * LANES, row, tiles + j * SUMMED, begin > start, n);
                }
            }
        }
        for (int64_t pair = 0; pair < (int64_t)sources * (sources + 1) / 2; pair++) {
            double sum = joined(lanes + pair * LANES);
            totals[pair] = begun ? totals[pair] + sum : sum;
        }
        begun = 1;
    }
}

/* ---- random masks ---- */

/* Writes the hashes of counters from first (kernels/random.py): two passes of MurmurHash3's finalizer, of which the last
   step is left out unless last. */
CLONES static void hash(uint32_t first, uint32_t one, uint32_t two, int32_t last, uint32_t *restrict out, int64_t elems) {
    uint32_t mask = last ? ~0u : 0;
    for (int64_t i = 0; i < elems; i++) {
        uint32_t word = (first + (uint32_t)i) ^ one;
        word *= 0x85ebca6b;
        word ^= word >> 13;
        word *= 0xc2b2ae35;
        word ^= two;
        word *= 0x85ebca6b;
        word ^= word >> 13;
        word *= 0xc2b2ae35;
        out[i] = word ^ (word >> 16 & mask);
    }
}

CLONES static void below(const uint32_t *restrict words, uint32_t limit, uint8_t *restrict out, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) out[i] = words[i] <= limit;
}

CLONES static void below_each(
    const uint32_t *restrict words, const uint32_t *restrict limits, uint8_t *restrict out, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) out[i] = words[i] <= limits[i];
}

/* A part of a grain that is hashed at once, a multiple of 8. */
#define HASHED 1024

/* Writes 1 where the hash of a counter is at most its limit, else 0. limits: one for each, or NULL if all have limit. */
static void choose(
    uint32_t first, uint32_t one, uint32_t two, int32_t last, uint32_t limit, const uint32_t *limits, uint8_t *out,
    int64_t elems) {
    uint32_t words[HASHED];
    for (int64_t begin = 0; begin < elems; begin += HASHED) {
        int64_t n = elems - begin < HASHED ? elems - begin : HASHED;
        hash(first + (uint32_t)begin, one, two, last, words, n);
        if (limits) below_each(words, limits + begin, out + begin, n);
        else below(words, limit, out + begin, n);
    }
}

/* Returns the bits of 8 flags, the first in the highest. */
static inline uint8_t packed(const uint8_t *flags) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t all; /* each flag is moved to its place in the highest byte; no two meet elsewhere */
    memcpy(&all, flags, sizeof all);
    return (uint8_t)(all * 0x8040201008040201 >> 56);
#else
    unsigned bits = 0;
    for (int i = 0; i < 8; i++) bits = bits << 1 | flags[i];
    return (uint8_t)bits;
#endif
}

/* As choose, a bit for each element, the first of 8 in the highest bit of a byte. */
void streammerge_choose_bits(
    uint32_t first, uint32_t one, uint32_t two, int32_t last, uint32_t limit, const uint32_t *limits, uint8_t *bits,
    int64_t elems) {
    uint8_t flags[HASHED];
    for (int64_t begin = 0; begin < elems; begin += HASHED) {
        int64_t n = elems - begin < HASHED ? elems - begin : HASHED;
        memset(flags, 0, sizeof flags);
        choose(first + (uint32_t)begin, one, two, last, limit, limits ? limits + begin : limits, flags, n);
        for (int64_t i = 0; i < (n + 7) / 8; i++) bits[begin / 8 + i] = packed(flags + 8 * i);
    }
}

CLONES static void to_floats(const uint8_t *restrict flags, float *restrict out, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) out[i] = flags[i];
}

/* As choose, a float for each element of several rows, each with keys of its own. */
void streammerge_choose_rows(
    int64_t rows, const uint32_t *one, const uint32_t *two, int32_t last, uint32_t limit, const uint32_t *limits,
    float *out, int64_t elems) {
    uint8_t flags[HASHED];
    for (int64_t row = 0; row < rows; row++)
        for (int64_t begin = 0; begin < elems; begin += HASHED) {
            int64_t n = elems - begin < HASHED ? elems - begin : HASHED, at = row * elems + begin;
            choose((uint32_t)begin, one[row], two[row], last, limit, limits ? limits + at : limits, flags, n);
            to_floats(flags, out + at, n);
        }
}

/* Multiplies numbers by what their bits stand for: table has 8 numbers for each value of a byte. */
CLONES void streammerge_mask_f32(
    float *restrict values, const uint8_t *restrict bits, const float *restrict table, int64_t elems) {
    int64_t i = 0;
    for (; i + 8 <= elems; i += 8) *(octet *)(values + i) *= *(const octet *)(table + 8 * bits[i / 8]);
    for (; i < elems; i++) values[i] *= table[8 * bits[i / 8] + i % 8];
}

CLONES void streammerge_mask_f64(
    double *restrict values, const uint8_t *restrict bits, const double *restrict table, int64_t elems) {
    int64_t i = 0;
    for (; i + 8 <= elems; i += 8)
        for (int j = 0; j < 8; j += 4) *(quad *)(values + i + j) *= *(const quad *)(table + 8 * bits[i / 8] + j);
    for (; i < elems; i++) values[i] *= table[8 * bits[i / 8] + i % 8];
}

/* ---- weighted differences from a base, in float32 ---- */

CLONES static void subtract_single(float *restrict a, const float *restrict b, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] -= b[i];
}

CLONES static void magnitude_single(float *restrict a, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] = as_float(as_bits(a[i]) & 0x7fffffff);
}

CLONES static void multiply_single(float *restrict a, float factor, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] *= factor;
}

/* Adds to totals, grain by grain, the sums of the magnitudes of all differences and of those that a mask keeps, or begins
   with them if begun is 0. bits: NULL if all are kept. table: 1 and 0 for the bits of each value of a byte. */
void streammerge_magnitudes(
    int64_t elems, const void *in, int32_t dtype, const void *base, int32_t base_dtype, const uint8_t *bits,
    const float *table, int64_t grain, double *totals, int32_t begun) {
    float row[SUMMED], of_base[SUMMED];
    double wide[SUMMED], all[LANES], kept[LANES];
    for (int64_t start = 0; start < elems; start += grain) {
        int64_t stop = elems - start < grain ? elems : start + grain;
        for (int64_t begin = start; begin < stop; begin += SUMMED) {
            int64_t n = stop - begin < SUMMED ? stop - begin : SUMMED;
            load_single(in, dtype, begin, n, row);
            load_single(base, base_dtype, begin, n, of_base);
            subtract_single(row, of_base, n);
            magnitude_single(row, n);
            load_f32(row, wide, n);
            add_f64(all, wide, begin > start, n);
            if (!bits) continue;
            streammerge_mask_f32(row, bits + begin / 8, table, n);
            load_f32(row, wide, n);
            add_f64(kept, wide, begin > start, n);
        }
        double sum = joined(all), of_kept = bits ? joined(kept) : sum;
        totals[0] = begun ? totals[0] + sum : sum;
        totals[1] = begun ? totals[1] + of_kept : of_kept;
        begun = 1;
    }
}

CLONES static void add_single(float *restrict a, const float *restrict b, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] += b[i];
}

CLONES static void divide_single(float *restrict a, float divisor, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] /= divisor;
}

CLONES static void divide_rows(float *restrict a, const float *restrict b, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] /= b[i];
}

/* 1 for each number with the sign of plus, -1 for each other. */
CLONES static void to_signs(float *restrict a, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] = as_float((as_bits(a[i]) & 0x80000000) | 0x3f800000);
}

/* Makes zero of what has not the sign. Adds the weight to the votes of what has it, or begins with it. */
CLONES static void agree(
    float *restrict row, const float *restrict signs, float *restrict votes, float weight, int begins, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) {
        float value = row[i] * signs[i];
        row[i] = value < 0 ? 0 : value;
        float vote = (row[i] > 0 ? 1.0f : 0.0f) * weight;
        votes[i] = begins ? vote : votes[i] + vote;
    }
}

CLONES static void multiply_single_rows(float *restrict a, const float *restrict b, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] *= b[i];
}

/* At least the least; or, without one, 1 where it is 0. */
CLONES static void at_least(float *restrict a, float least, int64_t elems) {
    for (int64_t i = 0; i < elems; i++) a[i] = least > 0 ? (a[i] < least ? least : a[i]) : a[i] + (a[i] == 0 ? 1.0f : 0.0f);
}

/* Writes base + scale * (the sum of the weighted differences / divisor), rounded; with elects, only those summed that have
   the sign of the sum, and with normalizes divided by the sum of their weights, at least `least` if that is above 0.
   Returns whether a result is not finite.

   bits: for each model its mask, or NULL. tables: for each model what the bits of each value of a byte are multiplied by.
   factors: of models without a mask. rows: memory for (models + 3) * SUMMED numbers. No dtype may be F64. */
int32_t streammerge_differences(
    int64_t elems, int32_t models, const void *const *in, const int32_t *in_dtypes, const void *base, int32_t base_dtype,
    const uint8_t *const *bits, const float *tables, const float *factors, const float *weights, int32_t elects,
    int32_t normalizes, float least, float divisor, float scale, void *out, int32_t out_dtype, float *rows) {
    float *of_base = rows + models * SUMMED, *signs = of_base + SUMMED, *votes = signs + SUMMED, *total = rows;
    int odd = 0;
    for (int64_t begin = 0; begin < elems; begin += SUMMED) {
        int64_t n = elems - begin < SUMMED ? elems - begin : SUMMED;
        load_single(base, base_dtype, begin, n, of_base);
        for (int32_t i = 0; i < models; i++) {
            float *row = rows + i * SUMMED;
            load_single(in[i], in_dtypes[i], begin, n, row);
            subtract_single(row, of_base, n);
            if (bits[i]) streammerge_mask_f32(row, bits[i] + begin / 8, tables + i * 2048, n);
            else multiply_single(row, factors[i], n);
            multiply_single(row, weights[i], n);
            if (!elects && i) add_single(total, row, n);
        }
        if (elects) {
            memcpy(signs, rows, sizeof(float) * (size_t)n);
            if (models == 1) for (int64_t i = 0; i < n; i++) signs[i] += 0.0f; /* as torch adds 0 to the only one */
            for (int32_t i = 1; i < models; i++) add_single(signs, rows + i * SUMMED, n);
            to_signs(signs, n);
            for (int32_t i = 0; i < models; i++) {
                agree(rows + i * SUMMED, signs, votes, weights[i], i == 0, n);
                if (i) add_single(total, rows + i * SUMMED, n);
            }
            multiply_single_rows(total, signs, n);
            if (normalizes) {
                at_least(votes, least, n);
                divide_rows(total, votes, n);
            }
        } else if (divisor != 1) divide_single(total, divisor, n);
        multiply_single(total, scale, n);
        add_single(total, of_base, n);
        odd |= store_single(total, out, out_dtype, begin, n);
    }
    return odd;
}
