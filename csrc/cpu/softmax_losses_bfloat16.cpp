// The losses on logits in bfloat16.
#include "cpu/softmax_run.h"

namespace fastadv {
template RunRows rows_of<BFloat16>(int);
}
