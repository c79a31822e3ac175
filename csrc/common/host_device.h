// Qualifiers of functions that the host compiler, nvcc and the emulator build all see.
#pragma once

#if defined(__CUDACC__)
#define LK_HOST_DEVICE __host__ __device__
#else
#define LK_HOST_DEVICE
#endif
