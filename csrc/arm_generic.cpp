#define TTCFAST_LEVEL generic
#include "arm_loop.h"
