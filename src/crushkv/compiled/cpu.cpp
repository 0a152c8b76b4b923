// What the library says of itself, and on which threads it runs.

#include "cpu.h"

extern "C" {

// OpenMP's own entry, given by the caller, so that PyTorch's threads are used. Without it, threads are made for each
// call.
void use_parallel(void* entry) { parallel = reinterpret_cast<Parallel>(entry); }

// Whether this build can run here.
int runs() {
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

}  // extern "C"
