/* A stand-in for NVIDIA's libnvidia-ml.so.1: the calls that Reaper makes, with answers from the environment.
 *
 * NVML_GPUS       how many GPUs there are
 * NVML_DIVIDED    the one that is divided into instances (MIG)
 * NVML_TOTAL      bytes that each has
 * NVML_PROCESSES  "PART KIND PID BYTES;..." with PART the number of a GPU, or 100 * (GPU + 1) + the number of an
 *                 instance, KIND one of C, G, M, and BYTES -1 where they are not known
 * NVML_COUNT      how many processes it claims there are, whatever it then tells
 * NVML_FAULTS     "FUNCTION[:PART]=WHAT;..." with WHAT an error code, or one of hang, spin, crash
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { unsigned long long total, free, used; } memory_t;

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

static const char *setting(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value ? value : otherwise;
}

static int fault(const char *function, long part)
{
    char named[128], all[4096], *rest = all;
    snprintf(named, sizeof named, "%s:%ld", function, part);
    snprintf(all, sizeof all, "%s", setting("NVML_FAULTS", ""));
    for (char *one; (one = strsep(&rest, ";"));) {
        char *what = strchr(one, '=');
        if (!what)
            continue;
        *what++ = 0;
        if (strcmp(one, function) && strcmp(one, named))
            continue;
        if (!strcmp(what, "hang"))
            for (;;)
                pause();
        if (!strcmp(what, "spin"))
            for (;;)
                __asm__ volatile("");
        if (!strcmp(what, "crash"))
            *(volatile int *)8 = 0;
        return atoi(what);
    }
    return OK;
}

#define FAIL_AS_TOLD(part) do { int code = fault(__func__, part); if (code) return code; } while (0)

static void *handle_of(long part) { return (void *)(part + 1); }
static long part_of(void *handle) { return (long)handle - 1; }

int nvmlInitWithFlags(unsigned flags) { FAIL_AS_TOLD(-1); return OK; }

int nvmlDeviceGetCount_v2(unsigned *count)
{
    FAIL_AS_TOLD(-1);
    *count = strtoul(setting("NVML_GPUS", "1"), NULL, 10);
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    FAIL_AS_TOLD(index);
    *handle = handle_of(index);
    return OK;
}

int nvmlDeviceGetMigMode(void *gpu, unsigned *now, unsigned *later)
{
    FAIL_AS_TOLD(part_of(gpu));
    if (!getenv("NVML_DIVIDED"))
        return NOT_SUPPORTED;
    *now = *later = atol(getenv("NVML_DIVIDED")) == part_of(gpu);
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(void *gpu, unsigned *count) { FAIL_AS_TOLD(part_of(gpu)); *count = 7; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(void *gpu, unsigned index, void **handle)
{
    FAIL_AS_TOLD(part_of(gpu));
    if (index % 2)
        return NOT_FOUND; /* instances come and go */
    *handle = handle_of(100 * (part_of(gpu) + 1) + index);
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *part, memory_t *memory)
{
    FAIL_AS_TOLD(part_of(part));
    memory->total = strtoull(setting("NVML_TOTAL", "85899345920"), NULL, 10);
    memory->free = memory->used = 0;
    return OK;
}

static int list(long part, char kind, unsigned *count, process_t *processes)
{
    char all[4096], *rest = all;
    unsigned found = 0, room = processes ? *count : 0;
    snprintf(all, sizeof all, "%s", setting("NVML_PROCESSES", ""));
    for (char *one; (one = strsep(&rest, ";"));) {
        long its_part, bytes;
        char its_kind;
        unsigned pid;
        if (sscanf(one, "%ld %c %u %ld", &its_part, &its_kind, &pid, &bytes) != 4 || its_part != part || its_kind != kind)
            continue;
        if (found < room)
            processes[found] = (process_t){pid, (unsigned long long)bytes, -1, -1};
        found++;
    }
    *count = getenv("NVML_COUNT") ? strtoul(getenv("NVML_COUNT"), NULL, 10) : found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

#define LIST(kind, letter) \
    int nvmlDeviceGet##kind##RunningProcesses_v2(void *part, unsigned *count, process_t *processes) \
    { FAIL_AS_TOLD(part_of(part)); return list(part_of(part), letter, count, processes); } \
    int nvmlDeviceGet##kind##RunningProcesses_v3(void *part, unsigned *count, process_t *processes) \
    { FAIL_AS_TOLD(part_of(part)); return list(part_of(part), letter, count, processes); }

LIST(Compute, 'C')
LIST(Graphics, 'G')
LIST(MPSCompute, 'M')
