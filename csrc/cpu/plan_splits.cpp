#include "transmla/mla_decode.h"

namespace transmla {

int plan_splits(index_t batch_size, index_t num_rows, index_t max_seqlen, int num_workers) {
  constexpr index_t kRowsPerItem = 64;
  constexpr index_t kItemsPerWorker = 4;  // evens out a ragged batch
  constexpr index_t kMinTokens = 512;     // a smaller part does not repay its merge
  const index_t items = batch_size * ((num_rows + kRowsPerItem - 1) / kRowsPerItem);
  if (num_workers <= 1 || items == 0) return 1;
  const index_t wanted = (kItemsPerWorker * num_workers + items - 1) / items;
  const index_t most = max_seqlen / kMinTokens;
  return static_cast<int>(wanted < most ? wanted : most < 1 ? 1 : most);
}

}  // namespace transmla
