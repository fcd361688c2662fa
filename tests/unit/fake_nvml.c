/* A stand-in for NVIDIA's management library: what it says is set by environment variables.

   FAKE_NVML_DEVICES    name|uuid|total MiB|used MiB|compute capability|mig (0 or 1), joined by ';'
   FAKE_NVML_INSTANCES  parent index|name|uuid|total MiB|used MiB, joined by ';'
   FAKE_NVML_INIT       a number: the error of nvmlInit; or hang, crash, exit, chatter,
                        or cores: fails unless core files are off
   FAKE_NVML_LOST       index of a device that fell off the bus
   FAKE_NVML_CLOCK      a number: the reasons of the present clock

   A total of 0 MiB means that memory cannot be asked for, as on GPUs that share the computer's memory. */

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, GPU_IS_LOST = 15 };
enum { MOST = 32 };

typedef struct {
    char name[96], uuid[96];
    unsigned long long total, used;
    int major, minor, mig, parent, is_instance;
} Device;

typedef struct { unsigned long long total, free, used; } Memory;

static Device devices[MOST], instances[MOST];
static unsigned device_count, instance_count;

static void load(void) {
    const char *text = getenv("FAKE_NVML_DEVICES");
    char copy[8192], *rest = NULL;
    device_count = instance_count = 0;
    snprintf(copy, sizeof copy, "%s", text ? text : "");
    for (char *item = strtok_r(copy, ";", &rest); item; item = strtok_r(NULL, ";", &rest)) {
        Device *d = &devices[device_count++];
        sscanf(item, "%95[^|]|%95[^|]|%llu|%llu|%d.%d|%d",
               d->name, d->uuid, &d->total, &d->used, &d->major, &d->minor, &d->mig);
    }
    text = getenv("FAKE_NVML_INSTANCES");
    snprintf(copy, sizeof copy, "%s", text ? text : "");
    for (char *item = strtok_r(copy, ";", &rest); item; item = strtok_r(NULL, ";", &rest)) {
        Device *d = &instances[instance_count++];
        d->is_instance = 1;
        sscanf(item, "%d|%95[^|]|%95[^|]|%llu|%llu", &d->parent, d->name, d->uuid, &d->total, &d->used);
    }
}

int nvmlInitWithFlags(unsigned flags) {
    const char *how = getenv("FAKE_NVML_INIT");
    (void)flags;
    load();
    if (!how) return SUCCESS;
    if (!strcmp(how, "hang")) {
        signal(SIGTERM, SIG_IGN);
        signal(SIGINT, SIG_IGN);
        for (;;) pause();
    }
    if (!strcmp(how, "crash")) {
        volatile int *nowhere = NULL;
        *nowhere = 1;
    }
    if (!strcmp(how, "exit")) _exit(0);
    if (!strcmp(how, "chatter")) {
        printf("NVML says {\n");
        fflush(stdout);
        return SUCCESS;
    }
    if (!strcmp(how, "cores")) {
        struct rlimit limit;
        getrlimit(RLIMIT_CORE, &limit);
        return limit.rlim_cur == 0 ? SUCCESS : NOT_SUPPORTED;
    }
    return atoi(how);
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "570.1");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = device_count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    const char *lost = getenv("FAKE_NVML_LOST");
    if (index >= device_count) return INVALID_ARGUMENT;
    if (lost && atoi(lost) == (int)index) return GPU_IS_LOST;
    *handle = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (unsigned i = 0; i < device_count; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            *handle = &devices[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *reasons) {
    const char *clock = getenv("FAKE_NVML_CLOCK");
    (void)device;
    *reasons = clock ? strtoull(clock, NULL, 0) : 0;
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *name, unsigned length) {
    snprintf(name, length, "%s", device->name);
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "%s", device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    if (device->total == 0 || device->mig) return NOT_SUPPORTED;
    memory->total = device->total << 20;
    memory->used = device->used << 20;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    if (device->is_instance) return NOT_SUPPORTED;
    *major = device->major;
    *minor = device->minor;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    if (device->major < 8) return NOT_SUPPORTED;
    *current = *pending = (unsigned)device->mig;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    (void)device;
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned slot, void **handle) {
    unsigned seen = 0;
    for (unsigned i = 0; i < instance_count; i++)
        if (&devices[instances[i].parent] == device && seen++ == slot) {
            *handle = &instances[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}
