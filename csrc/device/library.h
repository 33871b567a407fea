#pragma once

#include <string>

namespace zimage_rt {

// A shared library opened at run time, so that the module imports without it. Never closed.
class Library {
 public:
  // Throws std::runtime_error with the file and the message of the loader.
  explicit Library(const std::string& path);

  // Throws std::runtime_error if the library has no such function.
  template <typename Function>
  Function* function(const char* name) const {
    return reinterpret_cast<Function*>(symbol(name));
  }
  void* handle() const { return handle_; }

 private:
  void* symbol(const char* name) const;
  std::string path_;
  void* handle_;
};

}  // namespace zimage_rt
