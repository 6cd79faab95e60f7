// The losses on logits in float16.
#include "cpu/softmax_run.h"

namespace fastadv {
template RunRows rows_of<Half>(int);
}
