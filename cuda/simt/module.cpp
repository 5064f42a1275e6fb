#include "simt/module.h"

#include <link.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

namespace effops::device::simt {
namespace {

std::string program_path() {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  return std::string(path, length > 0 ? length : 0);
}

struct Search {
  uintptr_t code;
  Module found;
};

int visit(dl_phdr_info* info, size_t, void* context) {
  Search& search = *static_cast<Search*>(context);
  bool here = false;
  std::vector<Module::Range> constants;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info->dlpi_phdr[i];
    const Module::Range range{info->dlpi_addr + part.p_vaddr, info->dlpi_addr + part.p_vaddr + part.p_memsz};
    if (part.p_type == PT_LOAD) here = here || (search.code >= range.begin && search.code < range.end);
    if ((part.p_type == PT_LOAD && !(part.p_flags & PF_W)) || part.p_type == PT_GNU_RELRO) constants.push_back(range);
  }
  if (!here) return 0;
  search.found = {info->dlpi_name && *info->dlpi_name ? info->dlpi_name : program_path(), info->dlpi_addr, constants};
  return 1;
}

// addr2line prints a line for every function inlined at the address, the innermost first.
std::string lines_at(const std::string& path, uintptr_t offset) {
  if (path.find('\'') != std::string::npos) return "";
  char command[4352];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", path.c_str(), size_t(offset));
  FILE* output = popen(command, "r");
  if (!output) return "";
  std::string all;
  for (char line[1024]; std::fgets(line, sizeof line, output);) {
    line[std::strcspn(line, " \n")] = 0;  // also cuts off "(discriminator n)"
    const char* text = line + (std::strncmp(line, "./", 2) == 0 ? 2 : 0);
    if (text[0] == '?' || std::strncmp(text, "cuda/simt/machine.h", 19) == 0) continue;
    all += (all.empty() ? "" : ", in ") + std::string(text);
  }
  pclose(output);
  return all;
}

}  // namespace

const Module& module_of(const void* code) {
  static std::mutex mutex;
  static std::map<const void*, Module>& known = *new std::map<const void*, Module>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(code);
  if (at != known.end()) return at->second;
  Search search{reinterpret_cast<uintptr_t>(code), {}};
  dl_iterate_phdr(visit, &search);
  return known.emplace(code, search.found).first->second;
}

std::string describe_site(const Module& module, const void* return_address) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(return_address) - 1 - module.base;
  const std::string lines = lines_at(module.path, offset);
  if (!lines.empty()) return lines;
  char text[64];
  std::snprintf(text, sizeof text, "+0x%zx", size_t(offset));
  return module.path.substr(module.path.rfind('/') + 1) + text;
}

}  // namespace effops::device::simt
