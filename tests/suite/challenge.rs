//! Claim 31, between our own peers: a challenge replaces the broker token, so that even a process that passes the check of
//! the port's owner does not receive it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use landfall_tests::broker::{
    Agent, CONTAINER_PORT, Container, Peer, Published, Received, snapshot, try_dial_with,
};
use landfall_tests::case::Case;
use landfall_tests::rpc::register_with;
use landfall_tests::{Home, Impostor, ImpostorReply, Namespace, wait_until};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c31_challenge_replaces_the_token_between_our_peers", replaces_the_token),
    Case::once(
        "c31_challenge_a_container_that_answered_once_never_gets_the_token",
        required_after_one_answer,
    ),
    Case::once("c31_challenge_an_impostor_that_echoes_headers_gets_no_token", echoes),
    Case::once("c31_challenge_reflected_and_replayed_proofs_are_refused", reflected),
    Case::once("c31_challenge_relayed_to_another_container_is_refused", relayed_challenge),
    Case::once("c31_challenge_requirement_is_stored_with_its_token", kept_with_its_token),
];

const NAME: &str = "coder";
const TOKEN: &str = "canary-of-the-broker-0123456789-abcdefghijkl";

/// An agent inside, configured with its container's name.
fn agent(home: &Home, inside: &Namespace, name: &str) -> Agent {
    let mut command = Agent::command(home, TOKEN);
    command.env("LANDFALL_CONTAINER_NAME", name);
    Agent::spawn(home, inside, command)
}

fn fields(port: u16) -> Value {
    json!({"wsHostPort": port, "portForward": {"allow": "*"}, "brokerToken": TOKEN,
        "way": {"kind": "websocket"}})
}

fn connected(home: &Home, times: usize) {
    wait_until("the broker to be connected", || {
        let is_connected = |event: &Value| event["text"] == "[portbroker:coder] connected";
        let count = home.events().iter().filter(|event| is_connected(event)).count();
        if count >= times { Ok(()) } else { Err(home.events()) }
    });
}

#[track_caller]
fn refused(home: &Home, why: &str) {
    home.wait_for_event("notice", |event| event["text"].as_str().unwrap_or_default().contains(why));
}

const NO_ANSWER: &str = "does not prove that it is this container";

#[track_caller]
fn wait_until_required(home: &Home) {
    wait_until("the registration to say so", || {
        let registered = home.registered(NAME);
        let required = registered.as_ref().is_some_and(|fields| fields["challengeRequired"] == true);
        if required { Ok(()) } else { Err(registered) }
    });
}

fn replaces_the_token() {
    let (home, inside) = (Home::new(), Namespace::new());
    let _agent = agent(&home, &inside, NAME);
    let published = Published::start(inside.duplicate(), CONTAINER_PORT);
    let _daemon = home.daemon();
    register_with(&home, NAME, &fields(published.port()));
    connected(&home, 1);
    // The messages up to the subscription contain the proof, but not the token.
    wait_until("the subscription", || match published.recorded() {
        sent if sent.contains("port-watch-subscribe") => Ok(()),
        sent => Err(sent),
    });
    let sent = published.recorded();
    assert!(!sent.contains(TOKEN), "{sent}");
    assert!(sent.to_ascii_lowercase().contains("landfall-challenge: 1 coder "), "{sent}");
    assert!(sent.contains("\"proof\""), "{sent}");
}

fn required_after_one_answer() {
    let (home, inside) = (Home::new(), Namespace::new());
    let running = agent(&home, &inside, NAME);
    let published = Published::start(inside.duplicate(), CONTAINER_PORT);
    let port = published.port();
    let daemon = home.daemon();
    register_with(&home, NAME, &fields(port));
    connected(&home, 1);
    wait_until_required(&home);
    // A process of our own user that claims to be a peer of the reference takes its port.
    drop(published);
    running.kill();
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = wait_until("the port to be free", || TcpListener::bind(local));
    let impostor = Impostor::of_our_user(listener, ImpostorReply::Reference);
    refused(&home, NO_ANSWER);
    impostor.wait_for("GET /portbroker");
    impostor.assert_without(TOKEN);
    // The next daemon does not send the token either.
    daemon.kill();
    let before = impostor.connections();
    let _daemon = home.daemon();
    wait_until("the next daemon to try", || match impostor.connections() {
        now if now > before => Ok(()),
        now => Err(now),
    });
    let reported = |event: &Value| event["text"].as_str().unwrap_or_default().contains(NO_ANSWER);
    wait_until("the next daemon to refuse", || {
        match home.events().iter().filter(|event| reported(event)).count() {
            2.. => Ok(()),
            count => Err(count),
        }
    });
    impostor.assert_without(TOKEN);
    // The container itself connects again.
    drop(impostor);
    let _agent = agent(&home, &inside, NAME);
    let _published = Published::start_at(port, inside.duplicate(), CONTAINER_PORT);
    connected(&home, 2);
}

fn echoes() {
    let home = Home::new();
    let _daemon = home.daemon();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let impostor = Impostor::of_our_user(listener, ImpostorReply::Echo);
    // Also before any peer has answered a challenge.
    register_with(&home, NAME, &fields(impostor.address().port()));
    refused(&home, "its answer to our challenge is malformed");
    impostor.wait_for("landfall-challenge");
    impostor.assert_without(TOKEN);
    assert_eq!(home.registered(NAME).unwrap().get("challengeRequired"), None);
}

/// Opens a WebSocket of a host that sends this challenge, and returns the answer to it.
fn dial_with(inside: &Namespace, challenge: &str) -> (Peer, Option<String>) {
    let (peer, headers) = try_dial_with(inside, &[("landfall-challenge", challenge)]).unwrap();
    let answer = headers.get("landfall-challenge").map(|answer| answer.to_str().unwrap().to_owned());
    (peer, answer)
}

/// An attacker inside, or at the published port, without a token: it can request proofs from the agent.
fn reflected() {
    let (home, inside) = (Home::new(), Namespace::new());
    let _agent = agent(&home, &inside, NAME);
    let nonce = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    let challenge = format!("1 {NAME} {nonce}");
    let proof_of = |answer: &str| answer.rsplit(' ').next().unwrap().to_owned();
    let refused = |challenge: &str, proof: &str| {
        let (mut peer, answer) = dial_with(&inside, challenge);
        peer.send_message(&json!({"type": "broker-hello", "proof": proof}));
        assert_eq!(peer.message(), json!({"type": "broker-hello-nack", "reason": "invalid token"}));
        assert_eq!(peer.receive_end(), Received::Closed(Some(1008), "invalid token".to_owned()));
        answer
    };
    // The container's own proof sent back; a proof of an earlier connection; no proof.
    let first = refused(&challenge, "").expect("an answer");
    let second = refused(&challenge, &proof_of(&first)).expect("an answer");
    assert_ne!(first, second, "each connection has a nonce of its own");
    let (mut peer, answer) = dial_with(&inside, &challenge);
    peer.send_message(&json!({"type": "broker-hello", "proof": proof_of(&answer.unwrap())}));
    assert_eq!(peer.message()["type"], "broker-hello-nack");
    // A challenge to another container, or in another form, is not answered, and a proof for it is rejected.
    for other in [format!("1 other {nonce}"), format!("2 {NAME} {nonce}"), "1".to_owned(), String::new()] {
        assert_eq!(refused(&other, &proof_of(&first)), None, "{other}");
    }
}

fn relayed_challenge() {
    // Two containers that were given the same token; the registered port of one leads to the other.
    let (home, inside) = (Home::new(), Namespace::new());
    let _agent = agent(&home, &inside, "other");
    let wrong = Published::start(inside.duplicate(), CONTAINER_PORT);
    let _daemon = home.daemon();
    let mut required = fields(wrong.port());
    required["challengeRequired"] = json!(true);
    register_with(&home, NAME, &required);
    refused(&home, NO_ANSWER);
    let sent = wrong.recorded();
    assert!(
        sent.contains("GET /portbroker") && !sent.contains(TOKEN) && !sent.contains("broker-hello"),
        "{sent}"
    );
}

fn kept_with_its_token() {
    let (home, inside) = (Home::new(), Namespace::new());
    let running = agent(&home, &inside, NAME);
    let published = Published::start(inside.duplicate(), CONTAINER_PORT);
    let _daemon = home.daemon();
    register_with(&home, NAME, &fields(published.port()));
    connected(&home, 1);
    wait_until_required(&home);
    // The same instance, registered again by a client without support for the field.
    register_with(&home, NAME, &fields(published.port()));
    assert_eq!(home.registered(NAME).unwrap()["challengeRequired"], true);
    connected(&home, 2);
    // Another instance, which may be a peer of the reference, gets its own token as before.
    running.kill();
    let container = Container::listen("token-of-another-instance");
    container.register(&home, NAME);
    assert_eq!(home.registered(NAME).unwrap().get("challengeRequired"), None);
    let mut peer = container.welcome();
    peer.send_message(&snapshot(&[]));
    peer.ping();
}
