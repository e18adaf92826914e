#pragma once

#include <cstdint>

namespace ttcfast {

struct bfloat16 {
    uint16_t bits;
};

}  // namespace ttcfast
