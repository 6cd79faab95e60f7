// The losses on logits in float64.
#include "cpu/softmax_run.h"

namespace fastadv {
template RunRows rows_of<double>(int);
}
