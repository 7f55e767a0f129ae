/* As much of libnvidia-ml.so.1 as the doctor asks, with two GPUs: the first is well; what ails the second is in
   FAKE_NVML, a letter each: t taken memory, e ECC errors, p rows pending, f rows failed, h hot. */
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_t;

static int second(void *device) { return device == (void *)2; }
static int has(void *device, char what) {
    const char *faults = getenv("FAKE_NVML");
    return second(device) && faults && strchr(faults, what);
}
const char *nvmlErrorString(int result) { return result == 3 ? "Not Supported" : "Unknown Error"; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "550.54.15", size); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 12040; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(size_t)(index + 1); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) {
    (void)device;
    strncpy(text, "Fake 24G", size);
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory->total = 24ull << 30;
    memory->used = has(device, 't') ? 6ull << 30 : 1ull << 29;
    memory->free = memory->total - memory->used;
    return 0;
}
int nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, unsigned long long *count) {
    if (!second(device)) return 3; /* a GPU without ECC */
    *count = has(device, 'e') && kind == 1 && counter == 0 ? 3 : 0;
    return 0;
}
int nvmlDeviceGetRemappedRows(void *device, unsigned *corr, unsigned *unc, unsigned *pending, unsigned *failed) {
    *corr = *unc = 0;
    *pending = has(device, 'p');
    *failed = has(device, 'f');
    return 0;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
    *reasons = has(device, 'h') ? 0x40 : 0x4; /* a power cap is ordinary */
    return 0;
}
