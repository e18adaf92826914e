#define TTCFAST_LEVEL avx512
#include "arm_loop.h"
