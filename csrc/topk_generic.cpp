#define TTCFAST_LEVEL generic
#include "topk_loop.h"
