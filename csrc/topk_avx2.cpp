#define TTCFAST_LEVEL avx2
#include "topk_loop.h"
