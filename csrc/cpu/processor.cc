#include "cpu/processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace zimage_rt {

// Intel SDM, "CPUID": leaf 7 has AVX512_VNNI in bit 11 of ECX, and AVX-VNNI in bit 4 of EAX of its
// subleaf 1. The system must save the registers, which XCR0 says: 0x6 for AVX, 0xe6 for AVX-512.
bool multiplies_bytes_exactly() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kOsxsave = 1u << 27;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsxsave) == 0) return false;
  unsigned saved = 0, high = 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((c & (1u << 11)) != 0 && (saved & 0xe6) == 0xe6) return true;
  const unsigned subleaves = a;
  if (subleaves == 0 || __get_cpuid_count(7, 1, &a, &b, &c, &d) == 0) return false;
  return (a & (1u << 4)) != 0 && (saved & 0x6) == 0x6;
#else
  return true;
#endif
}

}  // namespace zimage_rt
