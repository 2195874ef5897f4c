#include "transmla/mla_decode.h"

namespace transmla {

int plan_splits(index_t batch_size, index_t num_rows, index_t max_seqlen, int num_workers) {
  (void)batch_size, (void)num_rows, (void)max_seqlen, (void)num_workers;
  return 1;
}

}  // namespace transmla
