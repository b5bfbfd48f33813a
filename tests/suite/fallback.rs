//! Claim 12: where io_uring is refused, the engine uses epoll and reports why.

use std::collections::BTreeMap;

use landfall_engine::RingChoice;
use landfall_engine::command::{Event, RingKind};
use landfall_engine::engine::{Engine, EngineOptions};
use landfall_tests::case::Case;
use landfall_tests::{End, Pattern, Relay, Server, connect, finish, read_to_end, send_all};
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

pub(crate) const CASES: &[Case] = &[
    Case::once("c12_falls_back_when_seccomp_refuses", || falls_back(Errno::PERM)),
    Case::once("c12_falls_back_when_the_kernel_lacks_io_uring", || falls_back(Errno::NOSYS)),
    Case::once("c12_an_explicit_io_uring_fails_where_it_is_refused", explicit_io_uring),
];

/// Makes `io_uring_setup(2)` fail in this thread and in those it starts.
fn refuse_io_uring(errno: Errno) {
    let answer = SeccompAction::Errno(u32::try_from(errno.raw_os_error()).unwrap());
    let io_uring_setup = 425;
    let rules = BTreeMap::from([(io_uring_setup, vec![])]);
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, architecture).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    apply_filter(&program).unwrap();
}

fn falls_back(errno: Errno) {
    refuse_io_uring(errno);
    let mut relay = Relay::start(RingChoice::Auto);
    let Event::Ready { ring, .. } = relay.driver.ready() else { panic!("{:?}", relay.driver.ready()) };
    assert_eq!(ring.kind, RingKind::Epoll);
    let reason = ring.reason.clone().expect("a reason");
    assert!(reason.contains("io_uring"), "{reason}");
    landfall_tests::note!("{errno}: {reason}");
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let forward = relay.forward(3000);
    let client = connect(forward.v4());
    let accepted = server.accept();
    std::thread::scope(|scope| {
        for (from, to, seed) in [(&client, &accepted, 1), (&accepted, &client, 2)] {
            scope.spawn(move || {
                send_all(from, Pattern::new(seed), 5_000_000);
                finish(from);
            });
            scope.spawn(move || {
                let mut checker = Pattern::new(seed).checker();
                assert_eq!(read_to_end(to, &mut checker), End::Eof);
                assert_eq!(checker.position(), 5_000_000);
            });
        }
    });
}

fn explicit_io_uring() {
    refuse_io_uring(Errno::PERM);
    let options = EngineOptions { ring: RingChoice::IoUring, ..EngineOptions::default() };
    let error = Engine::start(options).expect_err("there is no io_uring");
    assert!(error.to_string().contains("io_uring"), "{error}");
}
