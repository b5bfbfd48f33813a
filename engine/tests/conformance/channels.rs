//! Messages on channels.

use std::os::fd::{AsFd, OwnedFd};

use landfall_engine::channel::{Channel, ChannelError};
use landfall_engine::limits::Limits;
use landfall_engine::reactor::{Key, Readiness, SocketIo};

use crate::bench::{Bench, Real, run, tcp_pair};

fn received<P: Real>(bench: &mut Bench<P>, channel: Key) -> Result<(Vec<u8>, Vec<OwnedFd>), ChannelError> {
    bench.reactor.receive_message(channel, 4096)
}

pub(crate) fn messages_and_descriptors_arrive_in_order<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (ours, theirs) = Channel::pair().unwrap();
        let channel = bench.register(OwnedFd::from(ours));
        bench.drain_events();
        assert!(matches!(received(bench, channel), Err(ChannelError::WouldBlock)));
        let (socket, _peer) = tcp_pair();
        // Both messages arrive before the first is received.
        theirs.send(&1, &[socket.as_fd()]).unwrap();
        theirs.send(&2, &[]).unwrap();
        bench.await_ready(channel, Readiness::IN);
        let (text, sockets) = received(bench, channel).unwrap();
        assert_eq!((text.as_slice(), sockets.len()), (&b"1"[..], 1));
        let (text, sockets) = received(bench, channel).unwrap();
        assert_eq!((text.as_slice(), sockets.len()), (&b"2"[..], 0));
        assert!(matches!(received(bench, channel), Err(ChannelError::WouldBlock)));
        assert!(!bench.reactor.is_readable(channel));
        bench.drain_events();
        theirs.send(&3, &[]).unwrap();
        drop(theirs);
        bench.await_ready(channel, Readiness::IN);
        assert_eq!(received(bench, channel).unwrap().0, b"3");
        assert!(matches!(received(bench, channel), Err(ChannelError::Gone)));
        let sent = bench.reactor.on_socket(channel, |io, socket| io.send_message(socket, b"4")).unwrap();
        assert!(matches!(sent, Err(ChannelError::Gone)));
    });
}

pub(crate) fn a_full_channel_is_reported_when_it_has_room<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (ours, theirs) = Channel::pair().unwrap();
        let (channel, token) = bench.register_as(OwnedFd::from(ours));
        bench.drain_events();
        let send = |bench: &mut Bench<P>, text: &[u8]| {
            bench.reactor.on_socket(channel, |io, socket| io.send_message(socket, text)).unwrap()
        };
        let mut sent = 0u64;
        while send(bench, sent.to_string().as_bytes()).is_ok() {
            sent += 1;
            assert!(sent < 100_000, "the channel is never full");
        }
        bench.drain_events();
        let before = bench.events.len();
        for number in 0..sent {
            assert_eq!(theirs.recv::<u64>().unwrap().unwrap().0, number);
        }
        bench.until("room", |bench| bench.events[before..].iter().any(|event| event.token == token));
        send(bench, b"7").unwrap();
        assert_eq!(theirs.recv::<u64>().unwrap().unwrap().0, 7);
    });
}
