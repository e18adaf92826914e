// One tile of a problem: its state packed once, then the sums of any of its candidates.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "arm.h"
#include "arm_loop.h"
#include "field.h"

namespace ttcfast {

// Cells that one lane-wise sum covers before it is added in double; with kLanes it fixes the order of every addition.
constexpr int64_t kChunk = 4096;
constexpr int64_t kTile = 2 * kChunk;

// Uninitialised numbers aligned to a cache line.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count) {
        size_t bytes = static_cast<size_t>(count) * sizeof(T), space = bytes + 64;
        bytes_.reset(new unsigned char[space]);
        void* at = bytes_.get();
        data_ = static_cast<T*>(std::align(64, bytes, at, space));
    }
    T* data() const { return data_; }

  private:
    std::unique_ptr<unsigned char[]> bytes_;
    T* data_;
};

// The boundary mask in the loop's layout, built once per call: only slices with a masked cell, in the order of the cells.
template <class Acc>
class Boundary {
  public:
    Boundary(const ArmProblem& p, int width) : p_(p), width_(width) {
        const int64_t all = p.mask ? p.extent[0] * p.extent[1] * p.extent[2] : 0;
        for (int64_t first = 0; first < all; first += width) {
            const int64_t count = std::min<int64_t>(width, all - first);
            if (std::any_of(p.mask + first, p.mask + first + count, [](uint8_t m) { return m != 0; })) add(first, count, all);
        }
    }

    int64_t masked() const { return masked_; }

    // The slices in cells [first, last).
    MaskedSlices<Acc> among(int64_t first, int64_t last) const {
        const auto begin = std::lower_bound(cells_.begin(), cells_.end(), first), end = std::lower_bound(begin, cells_.end(), last);
        const int64_t skipped = begin - cells_.begin();
        const Acc* values = values_.empty() ? nullptr : values_.data() + skipped * width_ * p_.channels;
        return {cells_.data() + skipped, end - begin, first, masks_.data() + skipped * width_, values, static_cast<Acc>(p_.value)};
    }

  private:
    void add(int64_t first, int64_t count, int64_t all) {
        cells_.push_back(first);
        for (int64_t i = 0; i < width_; ++i) {
            const bool masked = i < count && p_.mask[first + i];
            masked_ += masked;
            masks_.push_back(masked ? ~MaskOf<Acc>(0) >> 1 : 0);
        }
        for (int64_t c = 0; p_.values && c < p_.channels; ++c) {
            const Acc* from = static_cast<const Acc*>(p_.values) + c * all + first;
            for (int64_t i = 0; i < width_; ++i) values_.push_back(i < count ? from[i] : Acc(0));
        }
    }

    const ArmProblem& p_;
    int width_;
    std::vector<int64_t> cells_;
    std::vector<MaskOf<Acc>> masks_;
    std::vector<Acc> values_;
    int64_t masked_ = 0;
};

inline Kind kind_of(const ArmProblem& p) {
    if (p.primitive) return p.energy < 0 ? Kind::primitive : Kind::primitive_with_energy;
    return p.pressure < 0 ? Kind::conserved : Kind::conserved_with_pressure;
}

// T is the stored type; `level` the instruction set, which does not affect results.
template <class T, class Acc>
class TileReader {
  public:
    TileReader(const ArmProblem& p, const Boundary<Acc>& boundary, const CellLoop<T>& in_place, const CellLoop<Acc>& gathered)
        : p_(p),
          boundary_(boundary),
          in_place_(in_place),
          on_gathered_(gathered),
          grid_{{p.extent[0], p.extent[1], p.extent[2]}},
          state_contiguous_(grid_.contiguous(p.state.stride_s)),
          cand_contiguous_(grid_.contiguous(p.cand.stride_s)),
          row_(std::min(kChunk, grid_.cells()) + 2 * kLanes<Acc>),
          state_rows_(p.components + 2),
          state_(state_rows_ * (std::min(kTile, grid_.cells()) + kLanes<Acc>)),
          gathered_(p.channels * row_),
          last_volumes_{},
          rows_(static_cast<size_t>(p.channels)),
          gathered_rows_(static_cast<size_t>(p.channels)) {
        std::fill_n(ones_, kLanes<Acc>, Acc(1));
        state_channels_[0] = p.density;
        std::copy_n(p.momentum, p.components, state_channels_ + 1);
        state_channels_[1 + p.components] = kind_of(p) == Kind::primitive ? p.pressure : p.energy;
        std::vector<bool> named(static_cast<size_t>(p.channels));
        auto name = [&](int channel) {
            if (channel >= 0) named[static_cast<size_t>(channel)] = true;
        };
        name(p.density);
        std::for_each(p.momentum, p.momentum + p.components, name);
        name(p.energy);
        name(p.pressure);
        for (int c = 0; c < p.channels; ++c) {
            if (!named[static_cast<size_t>(c)]) others_.push_back(c);
        }
    }

    // Adds the sums of candidates [first, last) of problem n on one tile to partials, which points to the problem's [candidates, tiles],
    // and those of its state to state_sums if that is not null.
    void run(int64_t n, int64_t first, int64_t last, int64_t tile, int64_t tiles, CellSums* partials, StateSums* state_sums) {
        if (state_sums || n != packed_problem_ || tile != packed_tile_) pack(n, tile, state_sums);
        for (int64_t b = first; b < last; ++b) {
            for (const Piece& piece : pieces_) add(n, b, piece, partials[b * tiles + tile]);
        }
    }

  private:
    void pack(int64_t n, int64_t tile, StateSums* state_sums) {
        const int64_t start = tile * kTile, end = std::min(start + kTile, grid_.cells());
        pieces_.clear();
        const Acc* state = state_.data();
        for (int64_t at = start; at < end;) {
            const Piece piece = piece_at(at, end, state);
            pack_state(n, piece);
            if (state_sums) on_gathered_.add_state(cells_of<Acc>(n, piece, gathered_rows_.data()), *state_sums);
            pieces_.push_back(piece);
            at += piece.cells;
            state += piece.groups * kLanes<Acc> * state_rows_;
        }
        packed_problem_ = n;
        packed_tile_ = tile;
    }

    // A chunk's whole groups, or the cells after the last whole group of the grid.
    struct Piece {
        int64_t start, cells, groups;
        const Acc* state;
        const Acc* volume;
        MaskedSlices<Acc> masked;
        bool whole() const { return cells == groups * kLanes<Acc>; }
    };

    Piece piece_at(int64_t start, int64_t end, const Acc* state) {
        const int64_t left = std::min(end - start, kChunk), groups = std::max<int64_t>(left / kLanes<Acc>, 1);
        const int64_t cells = std::min(left, groups * kLanes<Acc>);
        Piece piece{start, cells, groups, state, ones_, boundary_.among(start, start + cells)};
        if (p_.volumes) piece.volume = static_cast<const Acc*>(p_.volumes) + start;
        if (!piece.whole()) {
            std::copy_n(piece.volume, cells, last_volumes_);  // and 0 after them
            piece.volume = last_volumes_;
        }
        return piece;
    }

    void add(int64_t n, int64_t b, const Piece& piece, CellSums& total) {
        const T* base = static_cast<const T*>(p_.cand.data) + n * p_.cand.stride_n + b * p_.cand.stride_b;
        if (in_place_.add_sums && cand_contiguous_ && piece.whole()) {
            for (int64_t c = 0; c < p_.channels; ++c) rows_[static_cast<size_t>(c)] = base + c * p_.cand.stride_c + piece.start;
            in_place_.add_sums(cells_of<T>(n, piece, rows_.data()), total);
        } else {
            gather_all(p_.cand, base, cand_contiguous_, piece);
            on_gathered_.add_sums(cells_of<Acc>(n, piece, gathered_rows_.data()), total);
        }
    }

    template <class S>
    CellGroups<S> cells_of(int64_t n, const Piece& piece, const S* const* rows) const {
        const int* m = p_.momentum;
        return {piece.groups,
                rows,
                p_.density,
                {m[0], m[1], m[2]},
                p_.energy,
                p_.pressure,
                others_.data(),
                static_cast<int>(p_.channels),
                static_cast<int>(others_.size()),
                piece.state,
                piece.volume,
                p_.volumes ? kLanes<Acc> : 0,
                static_cast<Acc>(p_.gamma[n]),
                piece.masked};
    }

    // Padding after the last cell: a gas at rest, which changes nothing and violates nothing.
    Acc filling(int channel) const {
        return Acc(std::find(p_.momentum, p_.momentum + p_.components, channel) == p_.momentum + p_.components);
    }

    // Returns a piece of one channel as contiguous numbers in whole groups.
    const Acc* gather(const ArmField& field, const T* base, int64_t channel, bool contiguous, const Piece& piece, Acc fill) const {
        Acc* buffer = gathered_.data() + channel * row_;
        const Acc* row = read_cells(base + channel * field.stride_c, grid_, field.stride_s, contiguous, piece.start, piece.cells, buffer);
        if (piece.whole()) return row;
        std::copy_n(row, row == buffer ? 0 : piece.cells, buffer);
        std::fill(buffer + piece.cells, buffer + kLanes<Acc>, fill);
        return buffer;
    }

    void gather_all(const ArmField& field, const T* base, bool contiguous, const Piece& piece) {
        for (int c = 0; c < p_.channels; ++c)
            gathered_rows_[static_cast<size_t>(c)] = gather(field, base, c, contiguous, piece, filling(c));
    }

    // Rows interleaved by group, so that the state is one stream and never has the same address modulo 4096 as the candidate.
    void pack_state(int64_t n, const Piece& piece) {
        gather_all(p_.state, static_cast<const T*>(p_.state.data) + n * p_.state.stride_n, state_contiguous_, piece);
        const Acc* rows[5];
        for (int k = 0; k < state_rows_; ++k) rows[k] = gathered_rows_[static_cast<size_t>(state_channels_[k])];
        Acc* to = state_.data() + (piece.state - state_.data());
        for (int64_t cell = 0; cell < piece.groups * kLanes<Acc>; cell += kLanes<Acc>) {
            for (int k = 0; k < state_rows_; ++k, to += kLanes<Acc>) std::memcpy(to, rows[k] + cell, sizeof(Acc) * kLanes<Acc>);
        }
    }

    const ArmProblem& p_;
    const Boundary<Acc>& boundary_;
    CellLoop<T> in_place_;
    CellLoop<Acc> on_gathered_;
    Grid grid_;
    bool state_contiguous_, cand_contiguous_;
    int64_t row_;                         // numbers per channel in `gathered_`
    int state_rows_, state_channels_[5];  // what of the state is packed
    Buffer<Acc> state_, gathered_;
    Acc ones_[kLanes<Acc>], last_volumes_[kLanes<Acc>];
    std::vector<int> others_;
    int64_t packed_problem_ = -1, packed_tile_ = -1;
    std::vector<Piece> pieces_;  // of that tile
    std::vector<const T*> rows_;
    std::vector<const Acc*> gathered_rows_;
};

}  // namespace ttcfast
