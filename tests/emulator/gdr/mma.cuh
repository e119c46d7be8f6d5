// cuda/include/gdr/mma.cuh for the host. Copies that nothing waits for are done at once.
#pragma once

#include "gdr/types.cuh"

namespace gdr {

constexpr int kBlockBytes = 512;

template <bool kWide>
struct Operand {
    static constexpr int kType = kWide ? kBFloat16 : kFloat16;

    static u32 pack(float low, float high) { return to_bits<kType>(low) | u32{to_bits<kType>(high)} << 16; }
    static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        struct Operands {
            float a[4][2], b[2][2];
        } mine;
        for (int i = 0; i < 4; ++i) unpack<kType>(&a[i], mine.a[i]);
        unpack<kType>(&b0, mine.b[0]), unpack<kType>(&b1, mine.b[1]);
        const Operands* all = show(mine);
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k)
                c[i] +=
                    all[row * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2][k % 2] * all[column * 4 + k % 8 / 2].b[k / 8][k % 2];
        }
    }
};

inline void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Operands {
        float a[4], b[2];
    } mine;
    const auto cut = [](u32 x) { return __uint_as_float(x & 0xffffe000u); };
    for (int i = 0; i < 4; ++i) mine.a[i] = cut(a[i]);
    mine.b[0] = cut(b0), mine.b[1] = cut(b1);
    const Operands* all = show(mine);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 8; ++k)
            sum += double{all[row * 4 + k % 4].a[i / 2 + k / 4 * 2]} * all[column * 4 + k % 4].b[k / 4];
        c[i] = static_cast<float>(sum);
        if (std::abs(c[i]) > std::abs(sum)) c[i] = std::nextafter(c[i], 0.f);  // cut off, as tensor cores do
    }
}

struct Tile {
    float x[2][4];

    void clear() { *this = {}; }
    template <class Op>
    void pack(u32 (&a)[4]) const {
        for (int i = 0; i < 4; ++i) a[i] = Op::pack(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
    }
    template <class Op>
    void add_product(const u32 (&a)[4], const u32 (&b)[4]) {
        Op::mma(x[0], a, b[0], b[1]);
        Op::mma(x[1], a, b[2], b[3]);
    }
};

inline u32 shared_address(const void* x) { return static_cast<u32>(static_cast<const char*>(x) - shared); }
template <class T>
T* at_shared(u32 address) {
    if (address % sizeof(T) || address + sizeof(T) > shared_bytes) {
        fprintf(stderr, "shared memory: %zu bytes at %u\n", sizeof(T), address);
        abort();
    }
    return reinterpret_cast<T*>(shared + address);
}

struct alignas(16) Row {
    u16 x[8];
};

inline void load_matrices(u32 address, u32 (&x)[4]) {
    const u32* rows = show(address);
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) memcpy(&x[m], &at_shared<Row>(rows[m * 8 + lane / 4])->x[lane % 4 * 2], 4);
}

inline void load_matrices_transposed(u32 address, u32 (&x)[4]) {
    const u32* rows = show(address);
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) {
        const u32* first = rows + m * 8 + lane % 4 * 2;
        x[m] = at_shared<Row>(first[0])->x[lane / 4] | u32{at_shared<Row>(first[1])->x[lane / 4]} << 16;
    }
}

inline u32 transpose(u32 x) {
    const u32* all = show(x);
    const int lane = threadIdx.x % 32, row = lane % 4 * 2, column = lane / 4;
    const auto element = [&](int r, int c) { return all[r * 4 + c / 2] >> c % 2 * 16 & 0xffff; };
    return element(row, column) | element(row + 1, column) << 16;
}

inline void store_matrices_transposed(u32 address, const u32 (&x)[4]) {
    const u32* rows = show(address);
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) {
        const u32* first = rows + m * 8 + lane % 4 * 2;
        at_shared<Row>(first[0])->x[lane / 4] = static_cast<u16>(x[m]);
        at_shared<Row>(first[1])->x[lane / 4] = static_cast<u16>(x[m] >> 16);
    }
    __syncwarp();
}

inline float load_shared(u32 address) { return *at_shared<float>(address); }
inline float2 load_shared_pair(u32 address) { return *at_shared<float2>(address); }
inline void load_shared16(u32 address, u32 (&x)[4]) { memcpy(x, at_shared<uint4>(address), 16); }
inline void store_shared16(u32 address, const u32 (&x)[4]) { memcpy(at_shared<uint4>(address), x, 16); }
inline u32 in_order(int lane) { return lane * 16; }
inline float exp2_fast(float x) { return exp2f(x); }

inline void sync_threads(int barrier, int count) { cluster::blocks[cluster::block].of_some[barrier].wait(count); }

inline void copy16(u32 to, const void* from, bool exists) {
    if (exists) ptx::load16(from, reinterpret_cast<u32*>(at_shared<uint4>(to)));
    else *at_shared<uint4>(to) = {};
}
inline void copy16_once(u32 to, const void* from, bool exists) { copy16(to, from, exists); }
inline void wait_copies() {}
inline void publish_to_engines() {}
inline void store_bulk(void* to, u32 from, u32 bytes) {
    if ((reinterpret_cast<size_t>(to) | from | bytes) % 16) abort();
    memcpy(to, shared + from, bytes);
}
inline void wait_bulk_stores_read() {}
inline void wait_bulk_stores() {}
inline void order_with_engines() {}

struct Barrier {
    unsigned short count, missing, phase;  // arrivals a phase
    short unused;
    static inline int bytes[sizeof cluster::memory / 8];  // on their way

    u32 address() const { return shared_address(this); }
    void init(int arrivals) { *this = {static_cast<u16>(arrivals), static_cast<u16>(arrivals), 0, 0}, expect(0, true); }
    static void publish_inits() {}
    void arrive() {
        if (missing-- == 0) abort();
        end_phase();
    }
    void arrive_after_copies() { arrive(); }
    bool done(u32 parity) const { return phase % 2 != parity; }
    void wait(u32 parity) const {
        while (!done(parity)) let_others();
    }
    void arrive_expect(u32 more) { expect(more, false), arrive(); }
    void copy_bulk(u32 to, const void* from, u32 size) {
        if ((reinterpret_cast<size_t>(from) | to | size) % 16) abort();
        memcpy(shared + to, from, size);
        land(size);
    }
    void land(u32 size) { expect(-static_cast<int>(size), false), end_phase(); }

  private:
    void expect(int more, bool anew) {
        int& mine = on_their_way();
        mine = (anew ? 0 : mine) + more;
    }
    void end_phase() {
        if (missing == 0 && on_their_way() == 0) ++phase, missing = count;
    }
    int& on_their_way() const { return bytes[(reinterpret_cast<const char*>(this) - cluster::memory) / 8]; }
};
static_assert(sizeof(Barrier) == 8);

}  // namespace gdr
