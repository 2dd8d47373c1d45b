/* What passes.h and vectors.h defined for one dtype. */

#undef TYPE
#undef DTYPE
#undef STORED
#undef ARITHMETIC
#undef VEC
#undef WIDE
#undef BITS
#undef UBITS
#undef LANES
#undef MOMENTS
#undef PIECE
#undef LANE_SUMS
#undef KNOWN
#undef STRIP_SUMS
#undef TILE
