#define TTCFAST_LEVEL avx2
#include "arm_loop.h"
