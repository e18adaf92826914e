// Memory that a thread has done with and will soon want again. Given back to the system, its pages would be cleared at each return, at a
// cost like that of the arithmetic on them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace ttcfast {

class Spare {
  public:
    struct Block {
        std::unique_ptr<double[]> at;
        size_t size = 0;  // in doubles
    };

    Block take(size_t size) {
        for (Block& block : blocks) {
            if (block.size >= size && block.size <= 2 * size + 4096) {
                std::swap(block, blocks.back());
                Block found = std::move(blocks.back());
                blocks.pop_back();
                total -= found.size;
                return found;
            }
        }
        return {std::unique_ptr<double[]>(new double[size]), size};
    }

    void give(Block block) {
        total += block.size;
        blocks.push_back(std::move(block));
        while (total > kMost) {
            total -= blocks.front().size;
            blocks.erase(blocks.begin());
        }
    }

    static Spare& of_thread() {
        thread_local Spare spare;
        return spare;
    }

  private:
    static constexpr size_t kMost = size_t(1) << 23;  // 64 MiB

    std::vector<Block> blocks;
    size_t total = 0;
};

// Uninitialised memory for `count` numbers.
template <class T>
class Memory {
  public:
    explicit Memory(int64_t count = 0) {
        if (count > 0) block = Spare::of_thread().take(static_cast<size_t>(count) * sizeof(T) / sizeof(double) + 1);
    }
    Memory(Memory&&) = default;
    Memory& operator=(Memory&&) = default;
    ~Memory() {
        if (block.at) Spare::of_thread().give(std::move(block));
    }
    T* get() const { return reinterpret_cast<T*>(block.at.get()); }

  private:
    Spare::Block block;
};

}  // namespace ttcfast
