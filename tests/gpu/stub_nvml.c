/* As much of NVML as vLLM asks as it is imported: one H100, of which nothing can be computed on. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory;

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int flags) { (void)flags; return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "a stub"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = (void *)(uintptr_t)(index + 1); return 0; }
int nvmlDeviceGetHandleByUUID(const char *id, void **device) { (void)id; *device = (void *)1; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { (void)device; *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned int length) { (void)device; snprintf(name, length, "NVIDIA H100 80GB HBM3"); return 0; }
int nvmlDeviceGetUUID(void *device, char *name, unsigned int length) { (void)device; snprintf(name, length, "GPU-00000000-0000-0000-0000-000000000000"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory *m) { (void)device; m->total = 80ull << 30; m->free = m->total; m->used = 0; return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned int length) { snprintf(version, length, "580.159.04"); return 0; }
