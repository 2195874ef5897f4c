// Which instruction set the CPU kernels run with.
#pragma once

#include "transmla/types.h"

namespace transmla {

// Best last: the kernels take the highest one that the CPU has and the library was built with.
enum class Isa : int { kScalar, kNeon, kAvx2, kAvx512 };

TRANSMLA_API const char* isa_name(Isa isa);
TRANSMLA_API bool isa_available(Isa isa);
TRANSMLA_API Isa active_isa();
// For tests: makes every later call use `isa`. False, and nothing changes, when it is not
// available.
TRANSMLA_API bool force_isa(Isa isa);
// Back to the best one.
TRANSMLA_API void reset_isa();

}  // namespace transmla
