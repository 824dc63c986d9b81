/* The host's side of the CPU lane: parts of experts, computed where they lie, on request of a GPU.

A request stands in a mailbox in page-locked memory: which neurons of which experts, and the hidden
states. Threads of this library, each pinned to a core, wait for it by looking at its sequence
number, share the neurons evenly, and write the sums, in float32, where the GPU reads them. They
are no threads of Python's: one that looks all the time would keep the interpreter's lock from the
thread that launches the model.

The work is bound by reading the weights, so it needs no matrix unit: bfloat16 is widened by a shift
and multiplied in float32, with GCC's vector types, which exist for every processor. Who sums what,
and in which order, depends on the number of threads only: the same request gives the same bits.

Knows nothing of caches, slots or tokens to come.

Letters: T tokens, K experts per token, N = T * K uses, J jobs, D hidden, F neurons of an expert.
*/

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BLOCK 4        /* neurons whose rows are read together */
#define GROUP 32       /* numbers of a row in one vector of 64 bytes */
#define CACHE_LINE 64
#define SPIN_NS 20000000LL /* without a request for so long, threads begin to sleep in between */
#define LONGEST_SLEEP_NS 1000000LL

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(2), may_alias));

/* Of Python's `runtime.cpu_lane._Config`, field by field. */
typedef struct {
    int64_t hidden_size, num_neurons, num_rows, has_bias, num_experts, top_k, max_tokens, max_jobs;
    int64_t num_threads;
    const int32_t *core_of_thread; /* -1: wherever the system likes */
    const int64_t *home;           /* [L, E] addresses of records */
    const int32_t *kind;           /* [L] of `runtime.kernels.activation.KINDS` */
    const float *alpha, *limit;    /* [L] */
    int32_t *posted, *answered;    /* sequence numbers, each in a cache line of its own */
    const int32_t *request;        /* layer, T, J */
    const int32_t *job_expert, *job_first; /* [J]: neurons from first to F */
    const int32_t *expert_of_use;          /* [N] */
    const uint16_t *hidden;                /* [T, D] bfloat16 */
    float *answer;                         /* [N, D]; only uses of a job's expert are written */
} Config;

typedef struct Lane Lane;

typedef struct {
    Lane *lane;
    int64_t index;
    pthread_t thread;
    float *sums;      /* [N, D], each group of 32 as 16 even numbers and 16 odd ones */
    uint8_t *touched; /* [N] */
} Worker;

struct Lane {
    Config config;
    Worker *workers;
    float *hidden;      /* [T, D], in the order of the sums */
    int32_t *use_of_job; /* [J, N], as many as num_uses says */
    int32_t *num_uses;   /* [J] */
    int32_t layer, num_jobs, num_all_uses;
    int64_t num_neurons; /* of all jobs together */
    int64_t num_started;
    _Alignas(CACHE_LINE) atomic_int stop;
    _Alignas(CACHE_LINE) atomic_uint request; /* counts what the first thread has taken in */
    _Alignas(CACHE_LINE) atomic_uint arrived; /* at either barrier, ever */
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Waiting costs a core as long as requests follow each other, and little when none has come. */
typedef struct {
    int64_t since_ns;
    int32_t looks;
} Patience;

static void wait_a_little(Patience *patience) {
    relax();
    if (++patience->looks & 255)
        return;
    sched_yield(); /* to whoever else was given this core */
    int64_t now = now_ns();
    if (!patience->since_ns)
        patience->since_ns = now;
    int64_t idle_ns = now - patience->since_ns;
    if (idle_ns > SPIN_NS) {
        int64_t sleep_ns = idle_ns / 256;
        struct timespec t = {0, sleep_ns < LONGEST_SLEEP_NS ? sleep_ns : LONGEST_SLEEP_NS};
        nanosleep(&t, NULL);
        patience->looks = -1;
    }
}

static inline floats even(words w) { return (floats)(w << 16); }
static inline floats odd(words w) { return (floats)(w & 0xFFFF0000u); }

static float total(floats v) {
    float sum = 0;
    for (int i = 0; i < 16; i++)
        sum += v[i];
    return sum;
}

static float rounded(float x) { /* to bfloat16 and back, as the GPU does between projections */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x == x)
        bits += 0x7FFF + ((bits >> 16) & 1);
    bits &= 0xFFFF0000u;
    memcpy(&x, &bits, 4);
    return x;
}

static float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* `num` rows times x. Always inlined with a constant `num`, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void dots(
    const uint16_t *rows, int64_t stride, int num, const float *x, int64_t D, float *out) {
    floats sum_even[BLOCK] = {0}, sum_odd[BLOCK] = {0};
    for (int64_t d = 0; d < D; d += GROUP) {
        floats x_even = *(const floats *)(x + d), x_odd = *(const floats *)(x + d + 16);
        for (int r = 0; r < num; r++) {
            const uint16_t *at = rows + r * stride + d;
            __builtin_prefetch(at + BLOCK * stride);
            words w = *(const words *)at;
            sum_even[r] += even(w) * x_even;
            sum_odd[r] += odd(w) * x_odd;
        }
    }
    for (int r = 0; r < num; r++)
        out[r] = total(sum_even[r] + sum_odd[r]);
}

static inline __attribute__((always_inline)) void add_rows(
    const uint16_t *rows, int64_t stride, int num, const float *factor, float *sums, int64_t D) {
    for (int64_t d = 0; d < D; d += GROUP) {
        floats sum_even = *(floats *)(sums + d), sum_odd = *(floats *)(sums + d + 16);
        for (int r = 0; r < num; r++) {
            const uint16_t *at = rows + r * stride + d;
            __builtin_prefetch(at + BLOCK * stride);
            words w = *(const words *)at;
            sum_even += factor[r] * even(w);
            sum_odd += factor[r] * odd(w);
        }
        *(floats *)(sums + d) = sum_even;
        *(floats *)(sums + d + 16) = sum_odd;
    }
}

static float activated(float gate, float up, int has_gate, int32_t kind, float alpha, float limit) {
    float x = has_gate ? gate : up, y;
    switch (kind) {
    case 0:
        y = x / (1 + expf(-x));
        break;
    case 1:
        y = 0.5f * x * (1 + erff(x * 0.70710678f));
        break;
    case 2:
        y = 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        break;
    case 3:
        y = x > 0 ? x : 0;
        break;
    default:
        x = gate < limit ? gate : limit;
        y = x / (1 + expf(-alpha * x));
        up = (up < -limit ? -limit : up > limit ? limit : up) + 1;
    }
    return has_gate ? y * up : y;
}

static inline __attribute__((always_inline)) void some_neurons(
    Worker *worker, int32_t job, const uint16_t *record, int64_t first, int num) {
    Lane *lane = worker->lane;
    const Config *c = &lane->config;
    int64_t D = c->hidden_size, R = c->num_rows, N = c->max_tokens * c->top_k;
    const uint16_t *rows = record + first * R * D;
    const uint16_t *biases = record + c->num_neurons * R * D + first * (R - 1);
    for (int32_t i = 0; i < lane->num_uses[job]; i++) {
        int32_t use = lane->use_of_job[job * N + i];
        const float *x = lane->hidden + use / c->top_k * D;
        float gate[BLOCK] = {0}, up[BLOCK], inner[BLOCK];
        if (R == 3)
            dots(rows, R * D, num, x, D, gate);
        dots(rows + (R - 2) * D, R * D, num, x, D, up);
        for (int r = 0; r < num; r++) {
            if (c->has_bias) {
                gate[r] += widened(biases[r * (R - 1)]);
                up[r] += widened(biases[r * (R - 1) + R - 2]);
            }
            inner[r] = rounded(activated(gate[r], up[r], R == 3, c->kind[lane->layer],
                                         c->alpha[lane->layer], c->limit[lane->layer]));
        }
        add_rows(rows + (R - 1) * D, R * D, num, inner, worker->sums + use * D, D);
    }
}

/* A thread's even share of all jobs' neurons, which follow each other. */
static void compute(Worker *worker) {
    Lane *lane = worker->lane;
    const Config *c = &lane->config;
    int64_t D = c->hidden_size, F = c->num_neurons, N = c->max_tokens * c->top_k;
    int64_t begin = lane->num_neurons * worker->index / c->num_threads;
    int64_t end = lane->num_neurons * (worker->index + 1) / c->num_threads, start = 0;
    memset(worker->touched, 0, lane->num_all_uses);
    for (int32_t job = 0; job < lane->num_jobs; job++) {
        int64_t first = c->job_first[job], size = F - first;
        int64_t f = first + (begin > start ? begin - start : 0);
        int64_t last = first + (end - start < size ? end - start : size);
        start += size;
        if (f >= last)
            continue;
        for (int32_t i = 0; i < lane->num_uses[job]; i++) {
            int32_t use = lane->use_of_job[job * N + i];
            worker->touched[use] = 1;
            memset(worker->sums + use * D, 0, D * sizeof(float));
        }
        int64_t at = lane->layer * c->num_experts + c->job_expert[job];
        const uint16_t *record = (const uint16_t *)(intptr_t)c->home[at];
        for (; f + BLOCK <= last; f += BLOCK)
            some_neurons(worker, job, record, f, BLOCK);
        for (; f < last; f++)
            some_neurons(worker, job, record, f, 1);
    }
}

/* A thread's even share of the columns, summed over the threads in their order. */
static void gather(Worker *worker) {
    Lane *lane = worker->lane;
    const Config *c = &lane->config;
    int64_t D = c->hidden_size, groups = D / GROUP;
    int64_t begin = groups * worker->index / c->num_threads * GROUP;
    int64_t end = groups * (worker->index + 1) / c->num_threads * GROUP;
    for (int32_t use = 0; use < lane->num_all_uses; use++) {
        int touched = 0;
        for (int64_t i = 0; i < c->num_threads; i++)
            touched |= lane->workers[i].touched[use];
        if (!touched)
            continue;
        for (int64_t d = begin; d < end; d += GROUP) {
            floats sum_even = {0}, sum_odd = {0};
            for (int64_t i = 0; i < c->num_threads; i++) {
                if (!lane->workers[i].touched[use])
                    continue;
                const float *sums = lane->workers[i].sums + use * D + d;
                sum_even += *(const floats *)sums;
                sum_odd += *(const floats *)(sums + 16);
            }
            float *out = c->answer + use * D + d;
            for (int i = 0; i < 16; i++) {
                out[2 * i] = sum_even[i];
                out[2 * i + 1] = sum_odd[i];
            }
        }
    }
}

/* Read the mailbox. */
static void take_in(Lane *lane) {
    const Config *c = &lane->config;
    int64_t D = c->hidden_size, N = c->max_tokens * c->top_k;
    int32_t num_tokens = c->request[1];
    lane->layer = c->request[0];
    lane->num_jobs = c->request[2];
    lane->num_all_uses = num_tokens * (int32_t)c->top_k;
    lane->num_neurons = 0;
    for (int32_t job = 0; job < lane->num_jobs; job++) {
        lane->num_neurons += c->num_neurons - c->job_first[job];
        int32_t num = 0;
        for (int32_t use = 0; use < lane->num_all_uses; use++)
            if (c->expert_of_use[use] == c->job_expert[job])
                lane->use_of_job[job * N + num++] = use;
        lane->num_uses[job] = num;
    }
    for (int64_t at = 0; at < num_tokens * D; at += GROUP) {
        words w;
        memcpy(&w, c->hidden + at, sizeof w);
        *(floats *)(lane->hidden + at) = even(w);
        *(floats *)(lane->hidden + at + 16) = odd(w);
    }
}

static int all_arrive(Lane *lane, unsigned goal) { /* 0: the lane is being stopped */
    Patience patience = {0};
    atomic_fetch_add_explicit(&lane->arrived, 1, memory_order_acq_rel);
    while ((int)(atomic_load_explicit(&lane->arrived, memory_order_acquire) - goal) < 0) {
        if (atomic_load_explicit(&lane->stop, memory_order_relaxed))
            return 0;
        wait_a_little(&patience);
    }
    return 1;
}

static void *work(void *argument) {
    Worker *worker = argument;
    Lane *lane = worker->lane;
    const Config *c = &lane->config;
    unsigned requests = 0, threads = (unsigned)c->num_threads;
    int32_t answered = __atomic_load_n(c->answered, __ATOMIC_RELAXED);
    int32_t core = c->core_of_thread[worker->index];
    if (core >= 0) {
        cpu_set_t cores;
        CPU_ZERO(&cores);
        CPU_SET(core, &cores);
        pthread_setaffinity_np(pthread_self(), sizeof cores, &cores); /* refused: only slower */
    }
    Patience patience = {0};
    for (;;) {
        if (atomic_load_explicit(&lane->stop, memory_order_relaxed))
            return NULL;
        if (worker->index == 0) {
            int32_t posted = __atomic_load_n(c->posted, __ATOMIC_ACQUIRE);
            if (posted == answered) {
                wait_a_little(&patience);
                continue;
            }
            answered = posted;
            take_in(lane);
            atomic_store_explicit(&lane->request, requests + 1, memory_order_release);
        } else if (atomic_load_explicit(&lane->request, memory_order_acquire) == requests) {
            wait_a_little(&patience);
            continue;
        }
        patience = (Patience){0};
        requests++;
        compute(worker);
        if (!all_arrive(lane, (2 * requests - 1) * threads))
            return NULL;
        gather(worker);
        if (worker->index) {
            atomic_fetch_add_explicit(&lane->arrived, 1, memory_order_acq_rel);
            continue;
        }
        if (!all_arrive(lane, 2 * requests * threads))
            return NULL;
        __atomic_store_n(c->answered, answered, __ATOMIC_RELEASE);
    }
}

/* Stop and free; waits for the threads. */
void cpu_lane_stop(Lane *lane) {
    atomic_store(&lane->stop, 1);
    for (int64_t i = 0; i < lane->num_started; i++)
        pthread_join(lane->workers[i].thread, NULL);
    if (lane->workers)
        for (int64_t i = 0; i < lane->config.num_threads; i++) {
            free(lane->workers[i].sums);
            free(lane->workers[i].touched);
        }
    free(lane->workers);
    free(lane->hidden);
    free(lane->use_of_job);
    free(lane->num_uses);
    free(lane);
}

/* Start the threads. NULL: no memory, or no threads. What the config points to must stay. */
Lane *cpu_lane_start(const Config *config) {
    Lane *lane = aligned_alloc(CACHE_LINE, (sizeof(Lane) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    if (!lane)
        return NULL;
    memset(lane, 0, sizeof *lane);
    lane->config = *config;
    int64_t D = config->hidden_size, T = config->max_tokens, N = T * config->top_k;
    lane->workers = calloc(config->num_threads, sizeof(Worker));
    lane->hidden = aligned_alloc(CACHE_LINE, T * D * sizeof(float));
    lane->use_of_job = calloc(config->max_jobs * N, sizeof(int32_t));
    lane->num_uses = calloc(config->max_jobs, sizeof(int32_t));
    if (!lane->workers || !lane->hidden || !lane->use_of_job || !lane->num_uses)
        goto failed;
    for (int64_t i = 0; i < config->num_threads; i++) {
        Worker *worker = &lane->workers[i];
        worker->lane = lane;
        worker->index = i;
        worker->sums = aligned_alloc(CACHE_LINE, N * D * sizeof(float));
        worker->touched = calloc((N + CACHE_LINE) / CACHE_LINE, CACHE_LINE);
        if (!worker->sums || !worker->touched)
            goto failed;
    }
    for (int64_t i = 0; i < config->num_threads; i++) {
        if (pthread_create(&lane->workers[i].thread, NULL, work, &lane->workers[i]))
            goto failed;
        lane->num_started++;
    }
    return lane;
failed:
    cpu_lane_stop(lane);
    return NULL;
}
