// Products of float32 numbers on tensor cores, and what the kernels of the chunkwise rule share for them.
//
// Tensor cores read the 11 leading bits of a float32 number and leave out the rest. A product is the sum of three: of
// the leading bits, and of each one's leading bits with the rest of the other. What is missing is of the size of
// float32's own rounding. Sums on tensor cores are cut off, not rounded, which a sum over all chunks would add up:
// states are added to in float32 arithmetic.
//
// Every product's elements of the contraction are paired off as the accumulators have them: lane 4 g + t has the
// columns 2 t and 2 t + 1 of an accumulator, and these are the contraction's t and t + 4 of the next product.
#pragma once

#include "gdr/chunk.cuh"

namespace gdr {

static_assert(kQkv == kFloat32);

// ---- Products.

// In memory, so that the compiler does not know that tensor cores would take x itself for `high`: it would copy x to
// where an operand's registers must be, again and again.
__constant__ u32 kLeadingBits = 0xffffe000u;

__device__ __forceinline__ void split(float x, u32& high, u32& low) {
    high = __float_as_uint(x) & kLeadingBits;
    low = __float_as_uint(x - __uint_as_float(high));
}

// A left operand, 16 x 8: rows g, g + 8, g, g + 8 of columns t, t, t + 4, t + 4.
struct Left {
    u32 high[4], low[4];

    __device__ __forceinline__ void set(float a0, float a1, float a2, float a3) {
        const float a[4] = {a0, a1, a2, a3};
#pragma unroll
        for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
    }
    // An accumulator, whose columns become the contraction.
    __device__ __forceinline__ void set(const float (&c)[4]) { set(c[0], c[2], c[1], c[3]); }
};

// A right operand, 8 x 8: column g of rows t and t + 4.
struct Right {
    u32 high[2], low[2];

    __device__ __forceinline__ void set(float b0, float b1) { split(b0, high[0], low[0]), split(b1, high[1], low[1]); }
};

// c[n] += a b[n], kCount products that do not wait for one another.
template <int kCount>
__device__ __forceinline__ void add_products(float (&c)[kCount][4], const Left& a, const Right (&b)[kCount]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) mma_tf32(c[n], a.low, b[n].high[0], b[n].high[1]);
#pragma unroll
    for (int n = 0; n < kCount; ++n) mma_tf32(c[n], a.high, b[n].low[0], b[n].low[1]);
#pragma unroll
    for (int n = 0; n < kCount; ++n) mma_tf32(c[n], a.high, b[n].high[0], b[n].high[1]);
}

// ---- Keys and queries in shared memory: the rows of a chunk's tokens one after another, in pieces of 4 keys. The
// pieces of a row are permuted so that neither of the two ways to read them has bank conflicts: 4 pieces of 8 rows, or
// halves of 4 pieces of the rows 2 t or 2 t + 1 of every 8.

constexpr int kPieces = kKeys / 4, kRowBytes = kKeys * 4, kTokenBytes = kC * kRowBytes;
constexpr int kTiles = kC / 8;  // of 8 tokens

__device__ __forceinline__ u32 swizzle(u32 token) { return ((token ^ token / 4) & 1) * 4 + (token & 2); }
__device__ __forceinline__ u32 place_of(u32 token, u32 piece) {
    return token * kRowBytes + (piece ^ swizzle(token)) * 16;
}

// The lane's offset to what it reads of 16 keys' pieces in products over keys: row g, keys 4 t and on. `group` counts
// 16 keys; 32 keys further is 128 bytes further.
__device__ __forceinline__ u32 by_keys_f32(u32 lane, u32 group) { return place_of(lane / 4, group * 4 + lane % 4); }
// In products over tokens: row 2 t (or 2 t + 1 with `odd`), keys 2 g and 2 g + 1.
__device__ __forceinline__ u32 by_tokens_f32(u32 lane, u32 group, u32 odd) {
    return place_of(lane % 4 * 2 + odd, group * 4 + lane / 8) + lane / 4 % 2 * 8;
}

constexpr __host__ __device__ int power_of_two_in(int n) { return n & -n; }

// Brings the first `tokens` rows of a chunk, from `from` on and `step` bytes apart; the others become 0. `thread` of
// kThreads threads that all call it.
template <int kThreads>
__device__ __forceinline__ void copy_tokens(char* to, const char* from, i64 step, int tokens, int thread) {
    // Threads side by side in a row, and rows that are copied at once.
    constexpr int kAcross = power_of_two_in(kPieces) < kThreads ? power_of_two_in(kPieces) : kThreads,
                  kDown = kThreads / kAcross;
    const int across = thread % kAcross, down = thread / kAcross;
    from += down * step + across * 16;
#pragma unroll
    for (int token = 0; token < kC; token += kDown) {
#pragma unroll
        for (int piece = 0; piece < kPieces; piece += kAcross) {
            const int left = kK - (piece + across) * 4;
            const bool exists = token + down < tokens && (kK == kKeys || left > 0);
            char* const place = to + place_of(token + down, piece + across);
            if constexpr (kAligned) {
                copy16(shared_address(place), exists ? from + piece * 16 : from, exists);
            } else {
                u32 words[4];
                load_chunk<kFloat32, 4, false>(from, piece * 4, exists ? left : 0, words);
                *reinterpret_cast<uint4*>(place) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        from += kDown * step;
    }
}

// ---- The workspace: T, P and factors of a chunk and value head. Of T and P, tiles (i, j) of 8 x 8 with j <= i, row
// after row of tiles: rows are tokens t, columns tokens s. L2 norms are in the factors, so that K and Q are used as
// they are.

constexpr int kLowerTiles = kTiles * (kTiles + 1) / 2;
constexpr __host__ __device__ int lower_tile(int i, int j) { return (i * (i + 1) / 2 + j) * 64; }

struct alignas(128) HeadTileF32 {
    float T[kLowerTiles * 64], P[kLowerTiles * 64];
    float read[kC], query[kC], write[kC];  // of S K^T, of S Q^T, and of U in what it adds to S
    float d_last, unused[3];

    static constexpr int kUsed = (2 * kLowerTiles * 64 + 3 * kC + 4) * 4;
};

}  // namespace gdr
