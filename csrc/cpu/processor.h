#pragma once

namespace zimage_rt {

// Whether this processor multiplies unsigned by signed bytes with sums of 32 bits. x86 without VNNI
// adds pairs of products in 16 bits, which saturate; other architectures do not.
bool multiplies_bytes_exactly();

}  // namespace zimage_rt
