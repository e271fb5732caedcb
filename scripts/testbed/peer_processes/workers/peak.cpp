// run(rounds, threads): multiply-adds of registers, and nothing else, on so many threads at once.
// run(0, threads): floating-point operations of one round on all of them, or -1 where the system refuses the unit.
#include <immintrin.h>

#include <thread>
#include <vector>

#if defined(BF16_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(FP32_AVX512) || defined(FP32_AVX2) || defined(BF16_AVX512)
#if defined(FP32_AVX2)
typedef __m256 Vector;
#define START _mm256_setzero_ps()
#else
typedef __m512 Vector;
#define START _mm512_setzero_ps()
#endif
#if defined(BF16_AVX512)
#define MULTIPLY_ADD "vdpbf16ps"
static constexpr int PAIRS = 2;  // products in a lane
#else
#define MULTIPLY_ADD "vfmadd231ps"
static constexpr int PAIRS = 1;
#endif
static constexpr double FLOPS = 12 * 2.0 * PAIRS * sizeof(Vector) / sizeof(float);
#define ADD(sum) asm volatile(MULTIPLY_ADD " %1, %2, %0" : "+x"(sum) : "x"(x), "x"(y))
static void rounds_of(long rounds) {
  Vector x = START, y = START;
  Vector a = START, b = START, c = START, d = START, e = START, f = START;  // twelve sums hide the latency
  Vector g = START, h = START, i = START, j = START, k = START, l = START;
  for (long round = 0; round < rounds; ++round) {
    ADD(a); ADD(b); ADD(c); ADD(d); ADD(e); ADD(f);
    ADD(g); ADD(h); ADD(i); ADD(j); ADD(k); ADD(l);
  }
}
#elif defined(BF16_AMX)
static constexpr double FLOPS = 4 * 2.0 * 16 * 16 * 32;  // four sums of 16 x 16, each over 32 products
struct alignas(64) Shapes {
  unsigned char palette = 1, first_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {};
  unsigned char rows[16] = {};
};
static void rounds_of(long rounds) {
  Shapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = 16;
  asm volatile("" : : "r"(&shapes) : "memory");  // all of it is read, whatever the intrinsic says
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (long round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
#endif

static bool allowed() {
#if defined(BF16_AMX)
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return true;
#endif
}

extern "C" double run(long rounds, int threads) {
  if (rounds == 0) return allowed() ? FLOPS * threads : -1.0;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(rounds_of, rounds);
  rounds_of(rounds);
  for (std::thread& other : others) other.join();
  return 0.0;
}
