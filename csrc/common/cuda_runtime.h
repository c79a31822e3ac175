// cudaError_t, cudaStream_t and the calls of the runtime: the toolkit's, or the emulator's.
#pragma once

#if defined(LK_EMULATOR)
#include "emulator/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif
