// cuda/include/gdr/wgmma.cuh for the host. Products are done at once.
#pragma once

#include "gdr/mma.cuh"

namespace gdr {

struct Right {
    int address, depth, column;

    Right at(int bytes) const { return {address + bytes, depth, column}; }
    // Element (k, n) of a right operand, as products read it.
    template <int kType, bool kTransposed>
    float element(int k, int n) const {
        const int matrix = address + k / 8 * depth + n / 8 * column;
        const u32 bits = at_shared<Row>(matrix + (kTransposed ? k : n) % 8 * 16)->x[(kTransposed ? n : k) % 8];
        float x[2];
        unpack<kType>(&bits, x);
        return x[0];
    }
};

inline void begin_products() {}
inline void end_products() {}
template <int kLeft>
void wait_products() {}
template <class T>
void pin(T&) {}
template <int kRegisters>
void keep_registers() {}
template <int kRegisters>
void take_registers() {}

template <int kNumber, int kThreads>
void meet() {
    static const int count = kThreads;
    cluster::blocks[cluster::block].of_some[kNumber].wait(count);
}

// 16 rows of a warp by kBlocks blocks of 8 columns.
template <class Op, bool kTransposed, int kBlocks>
void multiply_blocks(float (*c)[4], const u32 (&a)[4], const Right& b, bool add) {
    struct Left {
        float x[4][2];
    } mine;
    for (int i = 0; i < 4; ++i) unpack<Op::kType>(&a[i], mine.x[i]);
    const Left* all = show(mine);
    const int lane = threadIdx.x % 32;
    for (int j = 0; j < kBlocks; ++j) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = j * 8 + lane % 4 * 2 + i % 2;
            float sum = add ? c[j][i] : 0;
            for (int k = 0; k < 16; ++k)
                sum += all[row * 4 + k % 8 / 2].x[i / 2 + k / 8 * 2][k % 2] *
                       b.template element<Op::kType, kTransposed>(k, column);
            c[j][i] = sum;
        }
    }
}

template <class Op, bool kTransposed>
void multiply(Tile (&c)[4], const u32 (&a)[4], const Right& b, bool add) {
    multiply_blocks<Op, kTransposed, 8>(c[0].x, a, b, add);
}
template <class Op>
void multiply(Tile (&c)[4], const Right& a, const Right& b, bool add) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16;
    for (int j = 0; j < 8; ++j) {
        for (int i = 0; i < 4; ++i) {
            const int row = first + lane / 4 + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
            float& x = c[j / 2].x[j % 2][i];
            if (!add) x = 0;
            for (int k = 0; k < 16; ++k)
                x += a.template element<Op::kType, false>(k, row) * b.template element<Op::kType, false>(k, column);
        }
    }
}
template <class Op, bool kTransposed, int kBlocks>
void multiply(float (&c)[kBlocks][4], const u32 (&a)[4], const Right& b, bool add) {
    multiply_blocks<Op, kTransposed, kBlocks>(c, a, b, add);
}

}  // namespace gdr
