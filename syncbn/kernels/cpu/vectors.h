/* A vector of the arithmetic of one dtype, 64 bytes: what is loaded is widened to it, what is stored rounded once.
Included for each dtype and each kind of processor, with STORED, ARITHMETIC, DTYPE and OF defined. */

typedef ARITHMETIC OF(vec) __attribute__((vector_size(64)));
#define VEC OF(vec)
#define LANES ((int64_t)(64 / sizeof(ARITHMETIC)))

typedef double OF(wide) __attribute__((vector_size(64 / sizeof(ARITHMETIC) * sizeof(double))));
#define WIDE OF(wide)

/* What a comparison of two vectors gives: all bits or none */
#if DTYPE == FLOAT64_
typedef int64_t OF(bits) __attribute__((vector_size(64)));
#else
typedef int32_t OF(bits) __attribute__((vector_size(64)));
typedef uint32_t OF(unsigned_bits) __attribute__((vector_size(64)));
#define UBITS OF(unsigned_bits)
#endif
#define BITS OF(bits)

typedef uint8_t OF(bytes) __attribute__((vector_size(64 / sizeof(ARITHMETIC))));

INLINE VEC OF(where)(BITS chosen, VEC v) { return (VEC)((BITS)v & chosen); }
INLINE VEC OF(broadcast)(ARITHMETIC value) { return value - (VEC){0}; }

#if DTYPE == FLOAT32_ || DTYPE == FLOAT64_

INLINE VEC OF(load)(const STORED *from) {
    VEC v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void OF(store)(STORED *to, VEC v) { memcpy(to, &v, sizeof v); }

#else

typedef uint16_t OF(halves) __attribute__((vector_size(32)));

INLINE UBITS OF(load_bits)(const STORED *from) {
    OF(halves) halves;
    memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, UBITS);
}

INLINE void OF(store_bits)(STORED *to, UBITS bits) {
    OF(halves) halves = __builtin_convertvector(bits, OF(halves));
    memcpy(to, &halves, sizeof halves);
}

INLINE UBITS OF(choose)(BITS chosen, UBITS yes, UBITS no) { return (yes & (UBITS)chosen) | (no & ~(UBITS)chosen); }

#if DTYPE == BFLOAT16_

INLINE VEC OF(load)(const STORED *from) { return (VEC)(OF(load_bits)(from) << 16); }

INLINE void OF(store)(STORED *to, VEC v) {
    const UBITS bits = (UBITS)v, nearest_even = bits + 0x7fff + (bits >> 16 & 1);
    OF(store_bits)(to, OF(choose)(v != v, bits | 0x400000, nearest_even) >> 16);
}

#else

INLINE VEC OF(load)(const STORED *from) {
    const UBITS half = OF(load_bits)(from);
    /* As a float its exponent is 112 too small; what is then past the largest half was infinite, or no number */
    const VEC magnitude = (VEC)((half & 0x7fff) << 13) * 0x1p112f;
    const UBITS infinite = (UBITS)(magnitude >= 65536.0f) & 0x7f800000;
    return (VEC)((UBITS)magnitude | infinite | (half & 0x8000) << 16);
}

INLINE void OF(store)(STORED *to, VEC v) {
    const UBITS bits = (UBITS)v, magnitude = bits & 0x7fffffff;
    const UBITS normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    /* Added to 1/2, a float is rounded where a half below 2^-14 ends */
    const UBITS tiny = (UBITS)((VEC)magnitude + 0.5f) - 0x3f000000;
    UBITS half = OF(choose)((BITS)magnitude < 0x38800000, tiny, normal);
    half = OF(choose)((BITS)magnitude >= 0x47800000, (UBITS){0} + 0x7c00, half);
    half = OF(choose)(v != v, (UBITS){0} + 0x7e00, half);
    OF(store_bits)(to, half | (bits >> 16 & 0x8000));
}

#endif
#endif

/* Of count values, which are LANES, known where it is compiled, or fewer; other lanes are 0. */
INLINE VEC OF(load_up_to)(const STORED *from, int64_t count) {
    if (count == LANES) return OF(load)(from);
    STORED all[LANES] = {0};
    for (int64_t i = 0; i < count; i++) all[i] = from[i];
    return OF(load)(all);
}

INLINE void OF(store_up_to)(STORED *to, VEC v, int64_t count) {
    STORED all[LANES];
    OF(store)(count == LANES ? to : all, v);
    if (count == LANES) return;
    for (int64_t i = 0; i < count; i++) to[i] = all[i];
}

/* All bits of the last lanes, so many of them. */
INLINE BITS OF(last_lanes)(int64_t count) {
#if DTYPE == FLOAT64_
    const BITS lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane >= LANES - count;
#else
    const BITS lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane >= (int32_t)(LANES - count);
#endif
}

/* Of one byte for each lane, which are those that count. */
INLINE BITS OF(lanes_of)(const uint8_t *mask, int64_t count) {
    OF(bytes) bytes = {0};
    if (count == LANES)
        memcpy(&bytes, mask, sizeof bytes);
    else
        for (int64_t i = 0; i < count; i++) bytes[i] = mask[i];
    return __builtin_convertvector(bytes, BITS) != 0;
}

/* 0 for what is below; what is no number stays so. */
INLINE WIDE OF(not_negative)(WIDE v) {
    typedef int64_t wide_bits __attribute__((vector_size(sizeof(WIDE))));
    return (WIDE)((wide_bits)v & ~(wide_bits)(v < 0));
}

/* The lanes of each half are added to those of the other. */
INLINE double OF(sum)(VEC v) {
    typedef double four __attribute__((vector_size(32)));
    const WIDE wide = __builtin_convertvector(v, WIDE);
    four part[LANES / 4];
    memcpy(part, &wide, sizeof part);
    for (int64_t n = LANES / 8; n > 0; n /= 2)
        for (int64_t i = 0; i < n; i++) part[i] += part[i + n];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}
