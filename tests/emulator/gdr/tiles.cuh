// cuda/include/gdr/tiles.cuh for the host; tests/emulated.py makes the maps.
#pragma once

#include "gdr/mma.cuh"

namespace gdr {

constexpr int turned_piece(int row, int piece) { return piece ^ row % 8; }

struct TilePlace {
    int column, token, head, batch;
};

struct alignas(64) TileMap {
    char* array;
    long long extents[4], strides[3];  // columns, tokens, heads, batches; bytes
    int columns, tokens, turned;       // of a tile

    u32 bytes() const { return columns * tokens * 2; }
    // Calls body(element in the array, or null outside; element in shared memory) for all of a tile.
    template <class Body>
    void for_each(const TilePlace& at, u32 tile, Body&& body) const {
        if (tile % (turned ? 1024 : 128) || (turned && columns != 64)) {
            fprintf(stderr, "a tile at %u\n", tile);
            abort();
        }
        const bool exists = 0 <= at.head && at.head < extents[2] && 0 <= at.batch && at.batch < extents[3];
        for (int t = 0; t < tokens; ++t) {
            for (int c = 0; c < columns; ++c) {
                const long long token = at.token + t, column = at.column + c;
                const bool inside = exists && 0 <= token && token < extents[1] && 0 <= column && column < extents[0];
                u16* element =
                    reinterpret_cast<u16*>(array + token * strides[0] + at.head * strides[1] + at.batch * strides[2]) +
                    column;
                const int piece = turned ? turned_piece(t, c / 8) : c / 8;
                body(inside ? element : nullptr, at_shared<u16>(tile + t * columns * 2 + piece * 16 + c % 8 * 2));
            }
        }
    }
};
static_assert(sizeof(TileMap) == 128);

inline void copy_tile(u32 to, const TileMap& map, const TilePlace& at, Barrier& barrier) {
    map.for_each(at, to, [](const u16* from, u16* to) { *to = from ? *from : 0; });
    barrier.land(map.bytes());
}
inline void store_tile(const TileMap& map, const TilePlace& at, u32 from) {
    map.for_each(at, from, [](u16* to, const u16* from) {
        if (to) *to = *from;
    });
}
inline void end_tile_stores() {}

}  // namespace gdr
