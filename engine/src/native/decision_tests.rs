use std::net::SocketAddr;

use proptest::prelude::*;

use super::super::procfs::Flags;
use super::*;

fn host(inside: &str, v6_only: bool) -> Option<String> {
    let at = HostAddress::of(inside.parse().unwrap(), v6_only)?;
    Some(format!("{}{}", at.address, if at.v6_only { " only" } else { "" }))
}

#[test]
fn every_address_maps_to_the_hosts_loopback() {
    let to = |address: &str| Some(address.to_owned());
    assert_eq!(host("0.0.0.0:3000", false), to("127.0.0.1:3000"));
    assert_eq!(host("127.0.0.1:3000", false), to("127.0.0.1:3000"));
    assert_eq!(host("127.8.9.1:3000", false), to("127.8.9.1:3000"));
    assert_eq!(host("[::]:3000", true), to("[::1]:3000 only"));
    assert_eq!(host("[::]:3000", false), to("[::]:3000"));
    assert_eq!(host("[::1]:3000", true), to("[::1]:3000 only"));
    assert_eq!(host("[::1]:3000", false), to("[::1]:3000"));
    assert_eq!(host("[::ffff:127.0.0.1]:3000", false), to("[::ffff:127.0.0.1]:3000"));
    assert_eq!(host("[::ffff:0.0.0.0]:3000", false), to("[::ffff:127.0.0.1]:3000"));
    for elsewhere in ["192.0.2.1:3000", "[2001:db8::1]:3000", "[fe80::1]:3000", "[::ffff:192.0.2.1]:3000"] {
        assert_eq!(host(elsewhere, false), None, "{elsewhere}");
    }
}

#[test]
fn clients_inside_are_relayed_to_an_address_that_answers() {
    let dial = |address: &str| {
        HostAddress { address: address.parse().unwrap(), v6_only: false }.to_dial().to_string()
    };
    assert_eq!(dial("[::]:3000"), "127.0.0.1:3000");
    assert_eq!(dial("[::1]:3000"), "[::1]:3000");
    assert_eq!(dial("[::ffff:127.0.0.1]:3000"), "127.0.0.1:3000");
}

fn facts(local: &str) -> SocketFacts {
    SocketFacts {
        is_tcp: true,
        is_inside: true,
        listens: false,
        is_stub: false,
        local: Some(local.parse().unwrap()),
        v6_only: false,
        has_device: false,
    }
}

#[test]
fn a_socket_is_replaced_only_if_every_fact_permits_it() {
    let decide = |facts: SocketFacts| about_socket(&facts, |_| true, true);
    let good = facts("127.0.0.1:3000");
    assert!(matches!(decide(good), AboutSocket::Replace(_, port) if port.get() == 3000));
    let relay = AboutSocket::Continue;
    assert_eq!(decide(SocketFacts { is_tcp: false, ..good }), relay(RelayReason::NotOurs));
    assert_eq!(decide(SocketFacts { is_inside: false, ..good }), relay(RelayReason::NotOurs));
    assert_eq!(decide(SocketFacts { listens: true, ..good }), relay(RelayReason::NotOurs));
    assert_eq!(decide(SocketFacts { local: None, ..good }), relay(RelayReason::NotOurs));
    assert_eq!(decide(facts("127.0.0.1:0")), relay(RelayReason::NotOurs));
    assert_eq!(decide(SocketFacts { has_device: true, ..good }), relay(RelayReason::Address));
    assert_eq!(decide(facts("192.0.2.1:3000")), relay(RelayReason::Address));
    assert_eq!(about_socket(&good, |_| false, true), relay(RelayReason::Denied));
    assert_eq!(about_socket(&good, |_| true, false), relay(RelayReason::Quota));
    let stub = SocketFacts { is_stub: true, listens: true, ..good };
    assert_eq!(about_socket(&stub, |_| false, false), AboutSocket::Rejoin, "it was decided before");
}

fn reference(descriptor: i32) -> Reference {
    Reference { descriptor, flags: Flags { close_on_exec: false, is_async: false } }
}

#[test]
fn every_duplicate_is_replaced_and_the_calls_own_comes_first() {
    let own = Some(vec![reference(3), reference(7)]);
    let injection = about_holders(Holders { own, ..Holders::default() }, 7, 1).unwrap();
    assert_eq!(injection.references, [reference(7), reference(3)]);
}

#[test]
fn a_reference_that_cannot_be_replaced_leaves_the_socket_to_the_relay() {
    let own = Some(vec![reference(3)]);
    let alone = Holders { own, ..Holders::default() };
    let decide = |holders: &Holders, threads| about_holders(holders.clone(), 3, threads);
    assert!(decide(&alone, 20).is_ok());
    assert_eq!(decide(&Holders { own: None, ..alone.clone() }, 1), Err(RelayReason::Unreadable));
    assert_eq!(about_holders(alone.clone(), 4, 1), Err(RelayReason::Unreadable));
    assert_eq!(decide(&Holders { is_watched: true, ..alone.clone() }, 1), Err(RelayReason::Epoll));
    assert_eq!(decide(&Holders { child_holds: true, ..alone.clone() }, 1), Err(RelayReason::Child));
    let two = Holders { own: Some(vec![reference(3), reference(4)]), ..alone.clone() };
    assert_eq!(decide(&two, 2), Err(RelayReason::Threads));
    assert!(decide(&two, 1).is_ok());
    let mut signals = reference(3);
    signals.flags.is_async = true;
    assert_eq!(decide(&Holders { own: Some(vec![signals]), ..alone }, 1), Err(RelayReason::Async));
}

#[test]
fn a_port_is_shared_only_inside_one_sandbox_and_only_when_the_server_asks_for_it() {
    let decide = |has_own, has_others, reuse_port| {
        about_conflict(PortFacts { has_own, has_others, reuse_port }, || Conflict::Fail)
    };
    assert_eq!(decide(true, false, true), AboutConflict::Join);
    for (own, others, reuse) in [
        (true, false, false),
        (true, true, true),
        (false, true, true),
        (false, true, false),
        (false, false, true),
    ] {
        assert_eq!(decide(own, others, reuse), AboutConflict::InUse);
    }
    let facts = PortFacts { has_own: false, has_others: true, reuse_port: false };
    let relayed = about_conflict(facts, || Conflict::Relay);
    assert_eq!(relayed, AboutConflict::Continue(RelayReason::Taken));
}

fn addresses() -> impl Strategy<Value = SocketAddr> {
    let v4 = (any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from);
    let v6 = (any::<[u8; 16]>(), any::<u16>()).prop_map(SocketAddr::from);
    let known = prop::sample::select(vec![
        "0.0.0.0:1",
        "127.0.0.1:1",
        "127.255.255.255:1",
        "[::]:1",
        "[::1]:1",
        "[::ffff:127.0.0.1]:1",
        "[::ffff:0.0.0.0]:1",
        "[::127.0.0.1]:1",
    ]);
    prop_oneof![v4, v6, known.prop_map(|text| text.parse().unwrap())]
}

proptest! {
    /// For every address that a program can bind, the host's socket is on loopback, or is a wildcard that
    /// `is_every_loopback` confines to `lo`.
    #[test]
    fn no_address_leads_off_the_loopback(inside in addresses(), v6_only: bool) {
        if let Some(at) = HostAddress::of(inside, v6_only) {
            let ip = at.address.ip().to_canonical();
            prop_assert!(ip.is_loopback() || at.is_every_loopback(), "{ip}");
            prop_assert!(at.to_dial().ip().is_loopback());
            prop_assert_eq!(at.address.port(), inside.port());
            prop_assert_eq!(at.address.is_ipv4(), inside.is_ipv4());
        }
    }

    #[test]
    fn a_socket_of_another_namespace_is_never_replaced(
        is_tcp: bool, listens: bool, is_stub: bool, v6_only: bool, has_device: bool, has_room: bool,
        local in prop::option::of(addresses()), may: bool,
    ) {
        let facts = SocketFacts { is_tcp, is_inside: false, listens, is_stub, local, v6_only, has_device };
        let decision = about_socket(&facts, |_| may, has_room);
        prop_assert_eq!(decision, AboutSocket::Continue(RelayReason::NotOurs));
    }
}
