// One token through a decoder of grouped-query attention, on a CPU: what PyTorch needs some 600 small operators for.
//
// A step reads every weight once, so it lasts as long as the memory takes; everything here is arranged for that. The
// weights are float32, bfloat16, float16 (rows as they are), or 8 or 4 bits with one float16 scale for a group of row
// elements. Activations are float32; before a product with 8 or 4 bits they are rounded to 8 bits by groups of 32, so
// that it is a product of whole numbers. Threads are made for each call (some 20 microseconds) and share its work.
//
// Vectors are the compiler's own (GCC, Clang), which every processor has; whole-number products have a form for AVX-512
// VNNI, one for AVX2, and a plain one. The layouts of weights are described in zoo/layers/quantized.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16x __attribute__((vector_size(64)));
typedef uint32_t u16x __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

enum Kind : int32_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4 };

constexpr long BLOCK = 16;  // rows that lie interleaved in 8 and 4 bits, and that threads divide the work by
constexpr long GROUP = 32;  // activations that share a scale

// ------------------------------------------------------------------------------------------------------ numbers

inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        float tiny = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&bits, &tiny, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t sign = uint16_t(bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return sign | 0x7c00 | (bits > 0x7f800000 ? 0x200 : 0);
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds beyond the largest
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    if (bits < 0x38800000) return sign | uint16_t(std::nearbyint(magnitude * 16777216.0f));  // a multiple of 2^-24
    bits += 0xfff + ((bits >> 13) & 1);
    return sign | uint16_t((bits - 0x38000000) >> 13);
}

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return half_to_float(x.bits); }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, f16* out) { out->bits = float_to_half(x); }
inline void from_float(float x, bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline v16 load(const float* p) {
    v16 v;
    std::memcpy(&v, p, 64);
    return v;
}

inline v16 load(const bf16* p) {
    h16 h;
    std::memcpy(&h, p, 32);
    return (v16)(__builtin_convertvector(h, u16x) << 16);
}

inline v16 load(const f16* p) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    v16 v;
    __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
    std::memcpy(&v, &low, 32);
    std::memcpy((char*)&v + 32, &high, 32);
    return v;
#else
    v16 v;
    for (int i = 0; i < 16; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
}

inline void store(float* p, v16 v) { std::memcpy(p, &v, 64); }
inline v16 all(float x) { return v16{} + x; }

inline float sum(v16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[16];
    store(s, v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
#endif
}

// e^x to float32's rounding: 2^n times a polynomial of what is left
inline v16 exponential(v16 x) {
    const v16 magic = all(12582912.0f);  // 1.5 x 2^23: added, it rounds to a whole number
    x = x < all(-87.0f) ? all(-87.0f) : x;
    x = x > all(88.0f) ? all(88.0f) : x;
    v16 n = (x * 1.44269504f + magic) - magic;
    v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (v16)((__builtin_convertvector(n, i16x) + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

inline void gate(const float* g, const float* u, float* out, long begin, long end) {
    long i = begin;
    for (; i + 16 <= end; i += 16) {
        v16 x = load(g + i);
        store(out + i, x / (exponential(-x) + 1.0f) * load(u + i));
    }
    for (; i < end; ++i) out[i] = silu(g[i]) * u[i];
}

template <class W>
inline float dot(const W* w, const float* x, long n) {
    v16 a{}, b{};
    long i = 0;
    for (; i + 32 <= n; i += 32) {
        a += load(w + i) * load(x + i);
        b += load(w + i + 16) * load(x + i + 16);
    }
    float s = sum(a + b);
    for (; i < n; ++i) s += to_float(w[i]) * x[i];
    return s;
}

inline void rms_norm(const float* x, const float* weight, float* out, long n, float eps) {
    float scale = 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps);
    for (long i = 0; i < n; ++i) out[i] = x[i] * scale;
    if (weight)
        for (long i = 0; i < n; ++i) out[i] *= weight[i];
}

// ------------------------------------------------------------------------------------------------------ threads

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Work in phases, each of so many items, whose results the next needs. A thread takes items of its own part, a few at a
// time, then what others have not begun: one that has no processor, or a slow one, keeps nobody waiting for more than
// what it has in hand. Threads that come when all is done leave without having touched anything.
class Phases {
  public:
    Phases(int threads, std::vector<long> items)
        : threads(threads), items(std::move(items)), counters(this->items.size() * size_t(threads + 1)) {}

    bool is_over() { return of(long(items.size()) - 1)->value.load(std::memory_order_acquire) >= items.back(); }

    // prepare() once, if there is something to do, then work(begin, end) for parts of the items; waits for all of them
    template <class Prepare, class Work>
    void run(long phase, int thread, const Prepare& prepare, const Work& work) {
        const long count = items[size_t(phase)];
        Counter* counter = of(phase);
        long finished = 0;
        bool is_ready = false;
        for (int k = 0; k < threads; ++k) {
            const long whose = (thread + k) % threads;
            const long begin = count * whose / threads, end = count * (whose + 1) / threads;
            const long step = std::max(1L, (end - begin) / 16);
            for (;;) {
                const long from = begin + counter[1 + whose].value.fetch_add(step, std::memory_order_relaxed);
                if (from >= end) break;
                if (!is_ready) prepare(), is_ready = true;
                const long to = std::min(from + step, end);
                work(from, to);
                finished += to - from;
            }
        }
        if (finished) counter->value.fetch_add(finished, std::memory_order_release);
        for (long spins = 0; counter->value.load(std::memory_order_acquire) < count; ++spins)
            if (spins < 2000)
                pause();
            else
                std::this_thread::yield();  // somebody else has the other's processor
    }

  private:
    struct alignas(64) Counter {
        std::atomic<long> value{0};
    };
    // how many items are done, and how many of each thread's part are taken
    Counter* of(long phase) { return counters.data() + phase * (threads + 1); }
    const int threads;
    const std::vector<long> items;
    std::vector<Counter> counters;
};

// task->run(thread), on as many threads of those asked for as the system grants; it is done when the first has returned
template <class Task>
void on_threads(int threads, const std::shared_ptr<Task>& task) {
    try {
        for (int i = 1; i < threads; ++i)
            std::thread([task, i] {
                if (!task->phases.is_over()) task->run(i);
            }).detach();
    } catch (const std::system_error&) {
    }
    task->run(0);
}

// rows of the blocks from one to another
struct Range {
    long begin, end;
};

inline Range rows_of(long from, long to, long rows) { return {from * BLOCK, std::min(rows, to * BLOCK)}; }
inline long blocks_of(long rows) { return (rows + BLOCK - 1) / BLOCK; }

// ------------------------------------------------------------------------------------------------------ products

struct Matrix {
    const void* data;
    const f16* scales;  // of 8 and 4 bits
    int64_t rows, cols;
    int32_t kind, group;
};

// Activations in 8 bits: x = scale * q, for each group, and the sum of its q.
struct Rounded {
    std::vector<int8_t> q;
    std::vector<float> scale;
    std::vector<int32_t> total;
    void resize(long n) {
        q.resize(size_t(n));
        scale.resize(size_t(n / GROUP));
        total.resize(size_t(n / GROUP));
    }
};

void round_to_int8(const float* x, long n, int8_t* q, float* scale, int32_t* total) {
    const v16 magic = all(12582912.0f);
    for (long g = 0; g < n / GROUP; ++g) {
        v16 a = load(x + g * GROUP), b = load(x + g * GROUP + 16);
        v16 m = a < 0 ? -a : a, k = b < 0 ? -b : b;
        m = m > k ? m : k;
#if defined(__AVX512F__)
        float largest = _mm512_reduce_max_ps((__m512)m);
#else
        float largest = 0;
        for (int i = 0; i < 16; ++i) largest = std::max(largest, m[i]);
#endif
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        i16x low = __builtin_convertvector((a * inverse + magic) - magic, i16x);
        i16x high = __builtin_convertvector((b * inverse + magic) - magic, i16x);
        scale[g] = largest / 127.0f;
#if defined(__AVX512F__)
        _mm_storeu_si128((__m128i*)(q + g * GROUP), _mm512_cvtepi32_epi8((__m512i)low));
        _mm_storeu_si128((__m128i*)(q + g * GROUP + 16), _mm512_cvtepi32_epi8((__m512i)high));
        total[g] = _mm512_reduce_add_epi32((__m512i)(low + high));
#else
        total[g] = 0;
        for (int i = 0; i < 16; ++i) {
            q[g * GROUP + i] = int8_t(low[i]);
            q[g * GROUP + 16 + i] = int8_t(high[i]);
            total[g] += low[i] + high[i];
        }
#endif
    }
}

// Sixty-four bytes of weights, from 0 up, of which each of 16 rows has four; and what they add to 16 sums.
#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512i Bytes;
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes b) { return low_nibbles(_mm512_srli_epi16(b, 4)); }
inline i16x add_products(i16x sums, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return (i16x)_mm512_dpbusd_epi32((__m512i)sums, w, _mm512_set1_epi32(four));
}
#elif defined(__AVX2__)
struct Bytes {
    __m256i a, b;
};
inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline Bytes low_nibbles(Bytes w) {
    __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
inline Bytes high_nibbles(Bytes w) { return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
inline __m256i eight_rows(__m256i w, __m256i even, __m256i odd) {
    __m256i mask = _mm256_set1_epi16(255);  // in 16 bits the products do not overflow
    return _mm256_add_epi32(
        _mm256_madd_epi16(_mm256_and_si256(w, mask), even), _mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd));
}
inline i16x add_products(i16x sums, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    __m256i all_x = _mm256_set1_epi32(four), odd = _mm256_srai_epi16(all_x, 8);
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(all_x, 8), 8), halves[2];
    std::memcpy(halves, &sums, 64);
    halves[0] = _mm256_add_epi32(halves[0], eight_rows(w.a, even, odd));
    halves[1] = _mm256_add_epi32(halves[1], eight_rows(w.b, even, odd));
    std::memcpy(&sums, halves, 64);
    return sums;
}
#else
struct Bytes {
    uint8_t b[64];
};
inline Bytes load_bytes(const uint8_t* p) {
    Bytes w;
    std::memcpy(&w, p, 64);
    return w;
}
inline Bytes low_nibbles(Bytes w) {
    for (uint8_t& b : w.b) b &= 15;
    return w;
}
inline Bytes high_nibbles(Bytes w) {
    for (uint8_t& b : w.b) b >>= 4;
    return w;
}
inline i16x add_products(i16x sums, Bytes w, const int8_t* x) {
    for (int r = 0; r < 16; ++r)
        sums[r] += w.b[4 * r] * x[0] + w.b[4 * r + 1] * x[1] + w.b[4 * r + 2] * x[2] + w.b[4 * r + 3] * x[3];
    return sums;
}
#endif

// 16 rows times M vectors, whose 8-bit forms lie `cols` apart
template <int M, bool FOUR_BITS>
inline void block_product(
    const uint8_t* w, const f16* scales, long cols, long group, const int8_t* q, const float* scale,
    const int32_t* total, v16* out) {
    const long groups = cols / GROUP, per_scale = group / GROUP;
    v16 sums[M] = {};
    for (long g = 0; g < groups; ++g) {
        i16x whole[M];
        for (int m = 0; m < M; ++m) whole[m] = i16x{} - total[m * groups + g] * (FOUR_BITS ? 8 : 128);
        for (int j = 0; j < 4; ++j) {
            Bytes first, second;
            if (FOUR_BITS) {
                Bytes both = load_bytes(w + 64 * j);
                first = low_nibbles(both), second = high_nibbles(both);
            } else {
                first = load_bytes(w + 64 * j), second = load_bytes(w + 64 * (j + 4));
            }
            for (int m = 0; m < M; ++m) whole[m] = add_products(whole[m], first, q + m * cols + g * GROUP + 4 * j);
            for (int m = 0; m < M; ++m)
                whole[m] = add_products(whole[m], second, q + m * cols + g * GROUP + 16 + 4 * j);
        }
        w += FOUR_BITS ? 256 : 512;
        v16 s = load(scales + g / per_scale * BLOCK);
        for (int m = 0; m < M; ++m) sums[m] += __builtin_convertvector(whole[m], v16) * (s * scale[m * groups + g]);
    }
    for (int m = 0; m < M; ++m) out[m] = sums[m];
}

template <bool FOUR_BITS>
void integer_rows(const Matrix& a, const Rounded& x, float* y, Range rows, bool add) {
    const long bytes = BLOCK * a.cols / (FOUR_BITS ? 2 : 1), scales = BLOCK * (a.cols / a.group);
    for (long n = rows.begin; n < rows.end; n += BLOCK) {
        v16 out;
        block_product<1, FOUR_BITS>(
            (const uint8_t*)a.data + n / BLOCK * bytes, a.scales + n / BLOCK * scales, a.cols, a.group, x.q.data(),
            x.scale.data(), x.total.data(), &out);
        if (n + BLOCK <= rows.end) {
            store(y + n, add ? out + load(y + n) : out);
        } else {
            for (long r = n; r < rows.end; ++r) y[r] = (add ? y[r] : 0.0f) + out[r - n];
        }
    }
}

template <class W>
void float_rows(const Matrix& a, const float* x, float* y, Range rows, bool add) {
    const long cols = a.cols;
    const W* w = (const W*)a.data + rows.begin * cols;
    for (long n = rows.begin; n < rows.end; ++n, w += cols) {
        v16 s[4] = {};
        long i = 0;
        for (; i + 64 <= cols; i += 64) {
            for (size_t ahead = 0; ahead < 64 * sizeof(W); ahead += 64)
                __builtin_prefetch((const char*)(w + i) + ahead + 4096);
            for (int k = 0; k < 4; ++k) s[k] += load(w + i + 16 * k) * load(x + i + 16 * k);
        }
        for (; i + 16 <= cols; i += 16) s[0] += load(w + i) * load(x + i);
        float total = sum((s[0] + s[1]) + (s[2] + s[3]));
        for (; i < cols; ++i) total += to_float(w[i]) * x[i];
        y[n] = add ? y[n] + total : total;
    }
}

// rows of y = A x, or y += A x; `x` also rounded where A is in 8 or 4 bits
void product(const Matrix& a, const float* x, const Rounded& rounded, float* y, Range rows, bool add = false) {
    switch (a.kind) {
        case F32: return float_rows<float>(a, x, y, rows, add);
        case BF16: return float_rows<bf16>(a, x, y, rows, add);
        case F16: return float_rows<f16>(a, x, y, rows, add);
        case INT8: return integer_rows<false>(a, rounded, y, rows, add);
        case INT4: return integer_rows<true>(a, rounded, y, rows, add);
    }
}

inline void prepare(const Matrix& a, const float* x, Rounded& rounded) {
    if (a.kind < INT8) return;
    rounded.resize(a.cols);
    round_to_int8(x, a.cols, rounded.q.data(), rounded.scale.data(), rounded.total.data());
}

template <bool FOUR_BITS>
void integer_block(
    const Matrix& a, long n, const int8_t* q, const float* scale, const int32_t* total, float* y, long count) {
    const long bytes = BLOCK * a.cols / (FOUR_BITS ? 2 : 1), groups = a.cols / GROUP;
    const uint8_t* w = (const uint8_t*)a.data + n / BLOCK * bytes;
    const f16* scales = a.scales + n / BLOCK * BLOCK * (a.cols / a.group);
    const long kept = std::min(BLOCK, long(a.rows) - n);
    v16 out[8];
    for (long m = 0; m < count;) {
        const int8_t* qm = q + m * a.cols;
        const float* sm = scale + m * groups;
        const int32_t* tm = total + m * groups;
        long done = 1;
        if (count - m >= 8) {
            block_product<8, FOUR_BITS>(w, scales, a.cols, a.group, qm, sm, tm, out);
            done = 8;
        } else if (count - m >= 4) {
            block_product<4, FOUR_BITS>(w, scales, a.cols, a.group, qm, sm, tm, out);
            done = 4;
        } else {
            block_product<1, FOUR_BITS>(w, scales, a.cols, a.group, qm, sm, tm, out);
        }
        for (long k = 0; k < done; ++k) std::memcpy(y + (m + k) * a.rows + n, &out[k], size_t(kept) * 4);
        m += done;
    }
}

// ------------------------------------------------------------------------------------------------------ a step

struct Layer {
    Matrix qkv, o, gate_up, down;
    const float *attention_norm, *mlp_norm;  // null where they are folded into the weights
};

struct Model {
    int32_t dim, heads, kv_heads, head_dim, hidden, executed, qk_norm;
    float eps;
    const float *cos, *sin;  // (positions, head_dim / 2)
    const float* norm;
    Matrix embedding, head;
    const Layer* layers;  // the executed ones, in order
};

struct Slot {  // what an executed layer remembers: (kv_heads, length, head_dim) each
    void *k, *v;
    int64_t length;
    int32_t is_ring, kind;
};

void embed(const Matrix& a, long token, float* out) {
    const long cols = a.cols;
    if (a.kind == F32) {
        std::memcpy(out, (const float*)a.data + token * cols, size_t(cols) * 4);
    } else if (a.kind == BF16) {
        for (long i = 0; i < cols; ++i) out[i] = to_float(((const bf16*)a.data)[token * cols + i]);
    } else if (a.kind == F16) {
        for (long i = 0; i < cols; ++i) out[i] = to_float(((const f16*)a.data)[token * cols + i]);
    } else {
        const bool four_bits = a.kind == INT4;
        const long block = token / BLOCK, row = token % BLOCK;
        const uint8_t* w = (const uint8_t*)a.data + block * (BLOCK * cols / (four_bits ? 2 : 1));
        const f16* scales = a.scales + block * BLOCK * (cols / a.group);
        for (long i = 0; i < cols; ++i) {
            long g = i / GROUP, j = i % GROUP / 4, k = i % 4;
            float scale = to_float(scales[i / a.group * BLOCK + row]);
            if (four_bits) {
                uint8_t both = w[g * 256 + j % 4 * 64 + row * 4 + k];
                out[i] = scale * float((j < 4 ? both & 15 : both >> 4) - 8);
            } else {
                out[i] = scale * float(int(w[g * 512 + j * 64 + row * 4 + k]) - 128);
            }
        }
    }
}

// turn pairs (i, i + width / 2) by the position's angles; then norm, where queries and keys have one
inline void rotate(float* x, const Model& model, long position) {
    const long half = model.head_dim / 2;
    const float *cos = model.cos + position * half, *sin = model.sin + position * half;
    for (long i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
    if (model.qk_norm) rms_norm(x, nullptr, x, model.head_dim, model.eps);
}

template <class T>
void remember(const float* from, void* to, long head, const Slot& slot, long place, long width) {
    T* out = (T*)to + (head * slot.length + place) * width;
    for (long i = 0; i < width; ++i) from_float(from[i], out + i);
}

// softmax(q k / sqrt(width)) v over `count` places of one head
template <class T>
void attend(const float* q, const T* k, const T* v, long count, long width, float* scores, float* out) {
    const float scale = 1.0f / std::sqrt(float(width));
    float largest = -INFINITY;
    for (long p = 0; p < count; ++p) {
        scores[p] = dot(k + p * width, q, width) * scale;
        largest = std::max(largest, scores[p]);
    }
    const long padded = (count + 15) / 16 * 16;
    for (long p = count; p < padded; ++p) scores[p] = -INFINITY;
    v16 sums{};
    for (long p = 0; p < padded; p += 16) {
        v16 e = exponential(load(scores + p) - largest);
        store(scores + p, e);
        sums += e;
    }
    float total = 0;
    if (padded > count) {  // exponential() has a least value
        for (long p = count; p < padded; ++p) scores[p] = 0;
        for (long p = 0; p < count; ++p) total += scores[p];
    } else {
        total = sum(sums);
    }
    long i = 0;
    for (; i + 64 <= width; i += 64) {
        v16 a[4] = {};
        for (long p = 0; p < count; ++p)
            for (int n = 0; n < 4; ++n) a[n] += scores[p] * load(v + p * width + i + 16 * n);
        for (int n = 0; n < 4; ++n) store(out + i + 16 * n, a[n] / total);
    }
    for (; i < width; ++i) {
        float a = 0;
        for (long p = 0; p < count; ++p) a += scores[p] * to_float(v[p * width + i]);
        out[i] = a / total;
    }
}

struct Step {
    const Model m;
    const Slot* slots;
    const long token, place, q_width, kv_width;
    float* logits;
    std::vector<float> x, qkv, mixed, wide, hidden;
    Phases phases;

    Step(const Model& model, const Slot* slots, long token, long place, float* logits, int threads)
        : m(model), slots(slots), token(token), place(place), q_width(long(m.heads) * m.head_dim),
          kv_width(long(m.kv_heads) * m.head_dim), logits(logits), x(size_t(m.dim)),
          qkv(size_t(q_width + 2 * kv_width)), mixed(size_t(q_width)), wide(size_t(2 * m.hidden)),
          hidden(size_t(m.hidden)), phases(threads, items(m)) {
        embed(m.embedding, token, x.data());
    }

    static std::vector<long> items(const Model& m) {
        std::vector<long> out;
        for (long l = 0; l < m.executed; ++l)
            for (long count : {blocks_of((m.heads + 2L * m.kv_heads) * m.head_dim), long(m.kv_heads), long(m.heads),
                               blocks_of(m.dim), blocks_of(m.layers[l].gate_up.rows / 2), blocks_of(m.dim)})
                out.push_back(count);
        out.push_back(blocks_of(m.head.rows));
        return out;
    }

    // keys and values of some heads
    void keep(const Slot& slot, long from, long to) {
        const long at = slot.is_ring ? place % slot.length : place;
        const auto keep = slot.kind == F32 ? remember<float> : slot.kind == BF16 ? remember<bf16> : remember<f16>;
        for (long h = from; h < to; ++h) {
            float *k = qkv.data() + q_width + h * m.head_dim, *v = k + kv_width;
            rotate(k, m, place);
            keep(k, slot.k, h, slot, at, m.head_dim);
            keep(v, slot.v, h, slot, at, m.head_dim);
        }
    }

    void attend_heads(const Slot& slot, long from, long to, float* scores) {
        const long count = slot.is_ring ? std::min<long>(place + 1, slot.length) : place + 1;
        for (long h = from; h < to; ++h) {
            float *q = qkv.data() + h * m.head_dim, *out = mixed.data() + h * m.head_dim;
            rotate(q, m, place);
            const long at = h / (m.heads / m.kv_heads) * slot.length * m.head_dim;
            if (slot.kind == F32)
                attend(q, (float*)slot.k + at, (float*)slot.v + at, count, m.head_dim, scores, out);
            else if (slot.kind == BF16)
                attend(q, (bf16*)slot.k + at, (bf16*)slot.v + at, count, m.head_dim, scores, out);
            else
                attend(q, (f16*)slot.k + at, (f16*)slot.v + at, count, m.head_dim, scores, out);
        }
    }

    void run(int thread) {
        std::vector<float> normed((size_t)m.dim), scores((size_t)(place + 17));
        Rounded rounded;
        const auto nothing = [] {};
        for (long l = 0; l < m.executed; ++l) {
            const Layer& layer = m.layers[l];
            const Slot& slot = slots[l];
            const auto norm_for = [&](const Matrix& a, const float* weight) {
                rms_norm(x.data(), weight, normed.data(), m.dim, m.eps);
                prepare(a, normed.data(), rounded);
            };
            phases.run(6 * l, thread, [&] { norm_for(layer.qkv, layer.attention_norm); }, [&](long from, long to) {
                product(layer.qkv, normed.data(), rounded, qkv.data(), rows_of(from, to, layer.qkv.rows));
            });
            phases.run(6 * l + 1, thread, nothing, [&](long from, long to) { keep(slot, from, to); });
            phases.run(6 * l + 2, thread, nothing, [&](long from, long to) {
                attend_heads(slot, from, to, scores.data());
            });
            phases.run(6 * l + 3, thread, [&] { prepare(layer.o, mixed.data(), rounded); }, [&](long from, long to) {
                product(layer.o, mixed.data(), rounded, x.data(), rows_of(from, to, m.dim), true);
            });
            phases.run(6 * l + 4, thread, [&] { norm_for(layer.gate_up, layer.mlp_norm); }, [&](long from, long to) {
                const long width = layer.gate_up.rows / 2;
                const Range own = rows_of(from, to, width);
                product(layer.gate_up, normed.data(), rounded, wide.data(), own);
                product(layer.gate_up, normed.data(), rounded, wide.data(), {width + own.begin, width + own.end});
                gate(wide.data(), wide.data() + width, hidden.data(), own.begin, own.end);
            });
            const auto round_hidden = [&] { prepare(layer.down, hidden.data(), rounded); };
            phases.run(6 * l + 5, thread, round_hidden, [&](long from, long to) {
                product(layer.down, hidden.data(), rounded, x.data(), rows_of(from, to, m.dim), true);
            });
        }
        const auto last = [&] {
            rms_norm(x.data(), m.norm, normed.data(), m.dim, m.eps);
            prepare(m.head, normed.data(), rounded);
        };
        phases.run(6L * m.executed, thread, last, [&](long from, long to) {
            product(m.head, normed.data(), rounded, logits, rows_of(from, to, m.head.rows));
        });
    }
};

// y (count, rows) = x (count, cols) A^T, for A in 8 or 4 bits
struct Linear {
    const Matrix a;
    const float* x;
    float* y;
    const long count, groups;
    std::vector<int8_t> q;
    std::vector<float> scale;
    std::vector<int32_t> total;
    Phases phases;

    Linear(const Matrix& a, const float* x, float* y, long count, int threads)
        : a(a), x(x), y(y), count(count), groups(a.cols / GROUP), q(size_t(count * a.cols)),
          scale(size_t(count * groups)), total(size_t(count * groups)),
          phases(threads, {count, blocks_of(a.rows)}) {}

    void run(int thread) {
        const auto nothing = [] {};
        phases.run(0, thread, nothing, [&](long from, long to) {
            round_to_int8(
                x + from * a.cols, (to - from) * a.cols, q.data() + from * a.cols, scale.data() + from * groups,
                total.data() + from * groups);
        });
        phases.run(1, thread, nothing, [&](long from, long to) {
            for (long n = from * BLOCK; n < std::min(long(a.rows), to * BLOCK); n += BLOCK) {
                if (a.kind == INT4)
                    integer_block<true>(a, n, q.data(), scale.data(), total.data(), y, count);
                else
                    integer_block<false>(a, n, q.data(), scale.data(), total.data(), y, count);
            }
        });
    }
};

}  // namespace

extern "C" {

// The logits of what follows `token`, which becomes number `place` of what the slots remember.
void zoo_step(const Model* model, const Slot* slots, int64_t token, int64_t place, float* logits, int32_t threads) {
    on_threads(threads, std::make_shared<Step>(*model, slots, token, place, logits, threads));
}

void zoo_linear(const Matrix* matrix, const float* x, float* y, int64_t count, int32_t threads) {
    on_threads(threads, std::make_shared<Linear>(*matrix, x, y, count, threads));
}

}  // extern "C"
