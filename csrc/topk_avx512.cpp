#define TTCFAST_LEVEL avx512
#include "topk_loop.h"
