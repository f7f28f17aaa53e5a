/* Counts of latencies in buckets: each power of two of nanoseconds is cut in SLICES, which takes no more memory for more of them. */
#include "load.h"

#include <math.h>

#define SLICE_BITS 6
#define SLICES (1 << SLICE_BITS)
#define POWERS 64

static long counts[POWERS * SLICES];
static long total;

static int bucket_of(uint64_t nanoseconds) {
  if (nanoseconds < SLICES) return (int)nanoseconds;
  int shift = 63 - __builtin_clzll(nanoseconds) - SLICE_BITS;
  return (shift << SLICE_BITS) + (int)(nanoseconds >> shift);
}

/* Nanoseconds in the middle of a bucket. */
static double value_of(int bucket) {
  if (bucket < 2 * SLICES) return bucket;
  int shift = (bucket >> SLICE_BITS) - 1;
  return ldexp(bucket - (shift << SLICE_BITS) + 0.5, shift);
}

void record(double seconds) {
  counts[bucket_of(seconds > 0 ? (uint64_t)(seconds * 1e9) : 0)]++;
  total++;
}

double percentile(double part) {
  double wanted = part * total, seen = 0;
  if (total == 0) return NAN;
  for (int bucket = 0; bucket < POWERS * SLICES; bucket++) {
    seen += counts[bucket];
    if (counts[bucket] > 0 && seen >= wanted) return value_of(bucket) / 1e3;
  }
  return NAN;
}
