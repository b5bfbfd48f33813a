//! Claim 16: a server is found on whichever loopback address it listens, and the client gets that server's answer.

use std::io::{Read, Write};
use std::net::SocketAddr;

use landfall_engine::RingChoice;
use landfall_engine::command::{Command, Family, Reach};
use landfall_tests::case::Case;
use landfall_tests::{Forward, Namespace, Relay, Server, connect, note};
use rustix::io::Errno;
use rustix::net::sockopt::set_ipv6_v6only;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c16_the_client_reaches_the_server_that_listens", reaches_the_listening_server),
    Case::each_ring("c16_two_servers_share_a_port_by_family", two_servers),
    Case::each_ring("c16_an_mptcp_server_answers", mptcp),
];

const V4: Reach = Reach { v4: true, v6: false };
const V6: Reach = Reach { v4: false, v6: true };

/// Answers each client with `label`.
fn labelled(server: Server, label: &'static str) {
    server.serve(move |mut stream| {
        // A client that has gone needs no answer.
        let _ = stream.write_all(label.as_bytes());
    });
}

fn answer(forward: Forward, family: Family) -> String {
    let mut text = String::new();
    connect(forward.at(family)).read_to_string(&mut text).unwrap();
    text
}

#[track_caller]
fn both_get(forward: Forward, label: &str) {
    for family in Family::ALL {
        assert_eq!(answer(forward, family), label, "by {family:?}");
    }
}

/// Sets the reach and waits until the engine uses it: the engine answers a state query after the commands before it.
fn set_reach(relay: &mut Relay, forward: Forward, reach: Reach) {
    relay.driver.apply(Command::SetReach { forward: forward.id, reach });
    let reported = relay.driver.describe().into_iter().find(|state| state.forward == forward.id);
    assert_eq!(reported.map(|state| state.reach), Some(reach));
}

fn reaches_the_listening_server(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let servers = [
        ("127.0.0.1:3000", "loopback, v4 only", V4),
        ("0.0.0.0:3001", "any, v4 only", V4),
        ("[::1]:3002", "loopback, v6 only", V6),
        ("[::]:3003", "dual-stack", Reach::UNKNOWN),
    ];
    for (address, label, reach) in servers {
        let server = Server::listen(&relay.inside, address);
        let port = server.port();
        labelled(server, label);
        // With the reach known, and without.
        let forward = relay.forward_reach(port, reach);
        both_get(forward, label);
        for other in [Reach::UNKNOWN, Reach { v4: false, v6: false }] {
            set_reach(&mut relay, forward, other);
            both_get(forward, label);
        }
    }
    labelled(v6_only_any(&relay.inside, 3004), "any, v6 only");
    let forward = relay.forward(3004);
    both_get(forward, "any, v6 only");
}

/// A listener on `::` that does not take IPv4.
fn v6_only_any(inside: &Namespace, port: u16) -> Server {
    let address: SocketAddr = (std::net::Ipv6Addr::UNSPECIFIED, port).into();
    Server::from_socket(inside.run(|| {
        let socket =
            rustix::net::socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        set_ipv6_v6only(&socket, true).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        rustix::net::listen(&socket, 128).unwrap();
        socket
    }))
}

fn two_servers(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    labelled(Server::listen(&relay.inside, "127.0.0.1:3000"), "four");
    labelled(Server::listen(&relay.inside, "[::1]:3000"), "six");
    let forward = relay.forward(3000);
    for _ in 0..20 {
        assert_eq!(answer(forward, Family::V4), "four");
        assert_eq!(answer(forward, Family::V6), "six");
    }
    // An upstream address that was reported as closed is not tried.
    set_reach(&mut relay, forward, V6);
    both_get(forward, "six");
    set_reach(&mut relay, forward, V4);
    both_get(forward, "four");
}

fn mptcp(ring: RingChoice) {
    const IPPROTO_MPTCP: u32 = 262;
    let protocol = std::num::NonZeroU32::new(IPPROTO_MPTCP).map(Protocol::from_raw);
    let probe =
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, protocol);
    if matches!(probe, Err(Errno::PROTONOSUPPORT | Errno::NOPROTOOPT | Errno::INVAL)) {
        note!("not tried, for this kernel has no MPTCP");
        return;
    }
    let mut relay = Relay::start(ring);
    let addresses =
        [("127.0.0.1:3000", "mptcp, v4"), ("[::1]:3001", "mptcp, v6"), ("[::]:3002", "mptcp, dual")];
    for (address, label) in addresses {
        let address: SocketAddr = address.parse().unwrap();
        labelled(Server::listen_backlog(&relay.inside, address, 128, protocol), label);
        let forward = relay.forward(address.port());
        both_get(forward, label);
    }
}
