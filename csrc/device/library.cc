#include "device/library.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace zimage_rt {

Library::Library(const std::string& path)
    : path_(path), handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) throw std::runtime_error(path + " cannot be opened: " + dlerror());
}

void* Library::symbol(const char* name) const {
  void* const found = dlsym(handle_, name);
  if (found == nullptr) throw std::runtime_error(path_ + " has no " + name);
  return found;
}

}  // namespace zimage_rt
