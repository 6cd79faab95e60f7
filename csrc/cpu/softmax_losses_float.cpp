// The losses on logits in float32.
#include "cpu/softmax_run.h"

namespace fastadv {
template RunRows rows_of<float>(int);
}
