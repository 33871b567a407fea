#include "models/vae.h"

#include <stdexcept>
#include <string>

namespace zimage_rt {

void check_image_size(const Vae& vae, int height, int width) {
  if (height % vae.factor() != 0 || width % vae.factor() != 0)
    throw std::invalid_argument("image: expected sizes that are multiples of " +
                                std::to_string(vae.factor()) + ", got " + std::to_string(height) +
                                " x " + std::to_string(width));
}

}  // namespace zimage_rt
