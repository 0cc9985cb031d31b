/*
 * Preloaded into each program that the keeper starts (ssh, sshfs, the view).
 *
 * Before main(): closed to other processes of the same user, bound to the keeper's life, deaf
 * to the signals that a scheduler sends to every process of a job (the keeper ends them in
 * order), and moved into the session's private folder, whose files have no name on the node.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#define TURNS 100000

__attribute__((constructor)) static void begin(void)
{
    const char *keeper = getenv("KAKEHASHI_KEEPER");
    const char *folder = getenv("KAKEHASHI_FOLDER");
    int turn;

    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        _exit(126);
    signal(SIGTERM, SIG_IGN);
    signal(SIGXCPU, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    if (keeper != NULL) {
        /* sshfs forks twice; the signal must follow the keeper, not the one in between. */
        pid_t wanted = (pid_t)atol(keeper);
        for (turn = 0; turn < TURNS && getppid() != wanted; turn++)
            sched_yield();
        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0 || getppid() != wanted)
            _exit(126);
    }
    if (folder != NULL && fchdir(atoi(folder)) != 0)
        _exit(126);
}
