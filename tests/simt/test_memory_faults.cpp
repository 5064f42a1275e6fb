// What ends the process all the same says which kernel it was.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "planted.h"

namespace effops::test {
namespace {

// What a child process that launches it writes to stderr, up to its end by SIGSEGV.
template <class Body>
std::string last_words(const Body& body) {
  int ends[2];
  CHECK(pipe(ends) == 0, "pipe");
  setenv("EFFOPS_SIMT_THREADS", "1", 1);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    simt::launch("faulty", 1, 64, 0, body);
    _exit(0);
  }
  unsetenv("EFFOPS_SIMT_THREADS");
  close(ends[1]);
  std::string text;
  char part[256];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, status, " ", text);
  return text;
}

TEST(memory_fault_names_the_kernel) {
  int* gone = static_cast<int*>(mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  const std::string text = last_words([=] {
    if (threadIdx.x == 40) *gone = 1;
  });
  CHECK(text.find("simt: kernel faulty, block (0, 0, 0), thread 40: memory fault at 0x") == 0, text);
}

int deep(volatile int* from) {
  volatile int own[256];
  for (int i = 0; i < 256; ++i) own[i] = from[i] + 1;
  return own[5] > 1 << 30 ? 0 : deep(own) + own[7];
}

TEST(stack_overflow_names_the_kernel) {
  const std::string text = last_words([] {
    volatile int own[256] = {};
    use(deep(own));
  });
  CHECK(text.find("simt: kernel faulty, block (0, 0, 0), thread 0: stack overflow at 0x") == 0, text);
}

}  // namespace
}  // namespace effops::test
