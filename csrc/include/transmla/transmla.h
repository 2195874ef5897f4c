// The whole C++ API.
#pragma once

#include "transmla/batched_pca.h"
#include "transmla/batched_svd.h"
#include "transmla/block_pool.h"
#include "transmla/covariance_add.h"
#include "transmla/isa.h"
#include "transmla/linear.h"
#include "transmla/merge_attn_states.h"
#include "transmla/mla_decode.h"
#include "transmla/mla_prefill.h"
#include "transmla/mla_project.h"
#include "transmla/types.h"
