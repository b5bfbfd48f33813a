use bytes::Bytes;

use super::*;

const TOKEN: &str = "a-token-that-nobody-may-see";

/// A session with a manual clock, and its actions since the last check.
struct Bench {
    session: Session,
    now: Instant,
    out: Vec<Action>,
}

impl Bench {
    fn new(offered: Extensions) -> Bench {
        let now = Instant::now();
        let session = Session::new(Token::new(TOKEN).unwrap(), false, offered, now);
        Bench { session, now, out: Vec::new() }
    }

    /// Creates a session whose hello was answered; the actions so far are discarded.
    fn up(offered: Extensions) -> Bench {
        let mut bench = Bench::new(offered);
        bench.connect(offered);
        bench.out.clear();
        bench
    }

    fn on(&mut self, input: Input) -> &mut Bench {
        self.session.on(input, self.now, &mut self.out);
        self
    }

    fn receive(&mut self, message: ToHost) -> &mut Bench {
        self.on(Input::Text(message))
    }

    /// Advances the clock. Passes [`Input::Time`] at each deadline and at the end, as the driver does.
    fn advance(&mut self, time: Duration) -> &mut Bench {
        let end = self.now + time;
        while let Some(due) = self.session.due().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.on(Input::Time);
        }
        self.now = end;
        self.on(Input::Time)
    }

    fn connect(&mut self, theirs: Extensions) -> &mut Bench {
        self.advance(Duration::ZERO).on(Input::Opened(None)).receive(ToHost::HelloAck { extensions: theirs })
    }

    fn dial(&mut self, dial: u64, port: u16) -> &mut Bench {
        self.on(Input::Dial(key(dial), at(port)))
    }

    /// Returns the actions since the last check, in short form.
    fn actions(&mut self) -> Vec<String> {
        std::mem::take(&mut self.out).iter().map(summary).collect()
    }

    /// Returns the delay from now until the next attempt.
    fn rest(&mut self) -> Duration {
        assert!(!self.actions().contains(&"connect".to_owned()));
        let began = self.now;
        let until = self.session.due().unwrap();
        self.advance(until - began);
        assert_eq!(self.actions(), ["connect"]);
        until - began
    }
}

fn at(port: u16) -> NonZeroU16 {
    NonZeroU16::new(port).unwrap()
}

fn key(dial: u64) -> DialKey {
    DialKey { channel: 1, dial }
}

fn listener(port: u16) -> Announced {
    Announced { port: at(port), loopback: true }
}

fn data(stream: i64, text: &'static str) -> ToHost {
    ToHost::Relay(StreamId(stream), Frame::Data(Bytes::from_static(text.as_bytes())))
}

fn closed(stream: i64) -> ToHost {
    ToHost::Relay(StreamId(stream), Frame::Close(Side::Upstream))
}

fn ack(stream: i64) -> ToHost {
    ToHost::OpenAck(StreamId(stream))
}

fn nack(stream: i64) -> ToHost {
    ToHost::OpenNack { stream: StreamId(stream), reason: "refused".to_owned() }
}

fn lost() -> Input {
    Input::Lost("connection reset".to_owned())
}

fn summary(action: &Action) -> String {
    let frame = |frame: &Frame| match frame {
        Frame::Data(payload) => format!("data {}", String::from_utf8_lossy(payload)),
        Frame::Close(side) => format!("close {side:?}"),
        other => format!("{other:?}"),
    };
    match action {
        Action::Connect => "connect".to_owned(),
        Action::Disconnect => "disconnect".to_owned(),
        Action::Send(ToContainer::Hello { credential, extensions }) => {
            let proof = if matches!(credential, Credential::Proof(_)) { " with a proof" } else { "" };
            format!(
                "say hello{proof}{}",
                if *extensions == Extensions::NONE { "" } else { " with extensions" }
            )
        }
        Action::Send(ToContainer::Subscribe) => "say subscribe".to_owned(),
        Action::Send(ToContainer::ForwardResult(result)) => {
            format!("say result {} {:?}", result.port, result.result)
        }
        Action::Send(ToContainer::Open { stream, port }) => format!("say open {} to {port}", stream.0),
        Action::Send(ToContainer::Relay(stream, sent)) => format!("say {} {}", stream.0, frame(sent)),
        Action::Send(ToContainer::Unsubscribe) => "say unsubscribe".to_owned(),
        Action::Announce(Announcement::Up) => "up".to_owned(),
        Action::Announce(Announcement::Down) => "down".to_owned(),
        Action::Announce(Announcement::Listening { opened, closed, whole }) => {
            let ports: Vec<u16> = opened.iter().map(|listener| listener.port.get()).collect();
            format!("listening {ports:?} closed {closed:?}{}", if *whole { " whole" } else { "" })
        }
        Action::Announce(Announcement::Reserve { target, candidates }) => {
            format!("reserve {target} {candidates:?}")
        }
        Action::Announce(Announcement::Stop(_)) => "announce stop".to_owned(),
        Action::StartStream { stream, key } => format!("begin {} for {}", stream.0, key.dial),
        Action::Refuse { key, why } => format!("refuse {} {why:?}", key.dial),
        Action::Deliver(stream, delivered) => format!("deliver {} {}", stream.0, frame(delivered)),
        Action::ResetStream(stream) => format!("cut {}", stream.0),
        Action::Notice(text) => format!("notice {text}"),
        Action::Answered => "answered".to_owned(),
        Action::Rejected(reason) => format!("rejected {reason}"),
    }
}

#[test]
fn the_hello_is_first_and_the_subscription_follows_its_answer() {
    let mut bench = Bench::new(Extensions::NONE);
    assert_eq!(bench.advance(Duration::ZERO).actions(), ["connect"]);
    assert_eq!(bench.on(Input::Opened(None)).actions(), ["say hello"]);
    bench.receive(ToHost::HelloAck { extensions: Extensions::ALL });
    assert_eq!(bench.actions(), ["notice connected", "up", "say subscribe"]);
    assert_eq!(bench.session.used(), Extensions::NONE);
    let mut bench = Bench::new(Extensions::ALL);
    assert_eq!(
        bench.advance(Duration::ZERO).on(Input::Opened(None)).actions(),
        ["connect", "say hello with extensions"]
    );
}

#[test]
fn an_extension_is_used_when_both_sides_list_it_on_this_connection() {
    let theirs = Extensions { binary: true, credit: true, ..Extensions::NONE };
    let mut bench = Bench::new(Extensions::ALL);
    bench.connect(theirs);
    assert_eq!(bench.session.used(), theirs);
    bench.on(lost()).advance(Duration::from_secs(1)).on(Input::Opened(None));
    assert_eq!(bench.session.used(), Extensions::NONE);
    bench.receive(ToHost::HelloAck { extensions: Extensions::NONE });
    assert_eq!(bench.session.used(), Extensions::NONE);
}

#[test]
fn messages_before_the_answer_to_the_hello_are_ignored() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.advance(Duration::ZERO).on(Input::Opened(None)).actions();
    bench
        .receive(ToHost::Snapshot(vec![listener(5173)]))
        .receive(ToHost::Opened(listener(5174)))
        .receive(ToHost::ForwardRequest { target: at(4848), candidates: vec![at(4848)], reason: None })
        .receive(ack(1))
        .receive(data(1, "x"))
        .on(Input::Binary(StreamId(1), Frame::Data(Bytes::from_static(b"x"))))
        .on(Input::Result(ForwardResult { port: at(5173), result: Ok(at(5173)) }));
    assert_eq!(bench.actions(), Vec::<String>::new());
    assert_eq!(bench.dial(7, 5173).actions(), ["refuse 7 Refused"]);
}

#[test]
fn a_refused_token_is_sent_once() {
    for reason in ["invalid token", "expected broker-hello first"] {
        let mut bench = Bench::new(Extensions::ALL);
        bench.advance(Duration::ZERO).on(Input::Opened(None)).actions();
        bench.receive(ToHost::HelloNack { reason: reason.to_owned() });
        let notice = format!("notice the token is refused, and not presented again: {reason}");
        assert_eq!(bench.actions(), ["disconnect", &notice, &format!("rejected {reason}")]);
        assert_eq!(bench.on(lost()).advance(Duration::from_secs(60)).actions(), Vec::<String>::new());
    }
}

#[test]
fn a_temporarily_refused_hello_is_retried_and_reported_once() {
    let mut bench = Bench::new(Extensions::ALL);
    for rest in [1, 2, 4] {
        bench.advance(Duration::ZERO).on(Input::Opened(None));
        bench.out.clear();
        let reason = format!("busy with {TOKEN}\u{1b}[31m");
        let actions = bench.receive(ToHost::HelloNack { reason }).actions();
        assert_eq!(actions[0], "disconnect");
        assert_eq!(actions.len(), if rest == 1 { 2 } else { 1 }, "{actions:?}");
        assert!(actions.iter().all(|line| !line.contains(TOKEN) && !line.contains('\u{1b}')), "{actions:?}");
        assert_eq!(bench.rest(), Duration::from_secs(rest));
    }
}

#[test]
fn the_delay_grows_with_consecutive_failures_until_a_hello_is_answered() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.advance(Duration::ZERO);
    let notice = "notice cannot connect, and is tried again until it works: connection reset";
    assert_eq!(bench.on(lost()).actions(), ["connect", notice]);
    for rest in [1, 2, 4, 10, 10, 10] {
        assert_eq!(bench.rest(), Duration::from_secs(rest));
        // A WebSocket that opens without an answer is a failure like any other, and is not reported again.
        assert_eq!(bench.on(Input::Opened(None)).on(lost()).actions(), ["say hello with extensions"]);
    }
    bench.advance(Duration::from_secs(10)).on(Input::Opened(None));
    bench.receive(ToHost::HelloAck { extensions: Extensions::ALL }).actions();
    let notice = "notice the connection is lost, and is tried again until it works: connection reset";
    assert_eq!(bench.on(lost()).actions(), ["down", notice]);
    assert_eq!(bench.rest(), Duration::from_secs(1));
}

#[test]
fn an_attempt_and_a_hello_time_out() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.advance(CONNECT_MAX - Duration::from_millis(1));
    assert_eq!(bench.actions(), ["connect"]);
    bench.advance(Duration::from_millis(1));
    let notice = "notice cannot connect, and is tried again until it works: no answer within 15 s";
    assert_eq!(bench.actions(), ["disconnect", notice]);
    assert_eq!(bench.rest(), Duration::from_secs(1));
    bench.on(Input::Opened(None)).advance(HELLO_ANSWER_MAX);
    let notice =
        "notice cannot connect, and is tried again until it works: no answer to the hello within 15 s";
    assert_eq!(bench.actions(), ["say hello with extensions", "disconnect", notice]);
    assert_eq!(bench.rest(), Duration::from_secs(2));
}

#[test]
fn a_container_that_has_answered_a_challenge_never_gets_the_token() {
    let mut bench = Bench::new(Extensions::NONE);
    let answered = || Input::Opened(Some("proof".to_owned()));
    let ack = || ToHost::HelloAck { extensions: Extensions::NONE };
    bench.advance(Duration::ZERO).actions();
    assert_eq!(bench.on(answered()).actions(), ["say hello with a proof"]);
    assert_eq!(bench.receive(ack()).actions(), ["notice connected", "answered", "up", "say subscribe"]);
    bench.on(lost()).actions();
    bench.rest();
    // The peer is now the reference implementation, or a program that claims to be it.
    let refused = bench.on(Input::Opened(None)).actions();
    assert_eq!(refused[0], "disconnect");
    assert!(refused[1].contains("does not prove that it is this container"), "{refused:?}");
    assert_eq!(refused.len(), 2);
    bench.rest();
    bench.on(answered()).receive(ack());
    assert_eq!(bench.actions().iter().filter(|line| *line == "answered").count(), 0, "it is known already");
}

#[test]
fn a_container_that_has_to_answer_from_the_start_never_gets_the_token() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.session = Session::new(Token::new(TOKEN).unwrap(), true, Extensions::ALL, bench.now);
    bench.advance(Duration::ZERO).actions();
    assert_eq!(bench.on(Input::Opened(None)).actions()[0], "disconnect");
    bench.rest();
    assert_eq!(
        bench.on(Input::Opened(Some("proof".to_owned()))).actions(),
        ["say hello with a proof with extensions"]
    );
}

#[test]
fn each_reason_of_an_outage_is_reported_once_up_to_a_limit() {
    let mut bench = Bench::new(Extensions::ALL);
    let mut count = 0;
    for number in [1, 2, 1, 2, 3, 4, 5, 6] {
        bench.rest();
        count += bench.on(Input::Lost(format!("reason {number}"))).actions().len();
    }
    assert_eq!(count, REASONS_MAX);
    bench.rest();
    bench.on(Input::Opened(None)).receive(ToHost::HelloAck { extensions: Extensions::ALL }).actions();
    assert_eq!(bench.on(Input::Lost("reason 1".to_owned())).actions().len(), 2, "another outage");
}

#[test]
fn listeners_are_announced_in_the_order_of_the_messages() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.receive(ToHost::Snapshot(vec![listener(8080), listener(5173), listener(8080)]));
    bench.receive(ToHost::Opened(listener(3000))).receive(ToHost::Closed(at(8080)));
    let reserve =
        ToHost::ForwardRequest { target: at(4848), candidates: vec![at(4848), at(4849)], reason: None };
    bench.receive(reserve);
    assert_eq!(
        bench.actions(),
        [
            "listening [8080, 5173] closed [] whole",
            "listening [3000] closed []",
            "listening [] closed [8080]",
            "reserve 4848 [4848, 4849]",
        ]
    );
}

#[test]
fn c24_a_flood_of_listeners_is_limited_and_the_excess_is_answered() {
    let mut bench = Bench::up(Extensions::NONE);
    let all = || (1..=u16::MAX).map(listener).collect::<Vec<_>>();
    let counts = |did: Vec<String>| {
        let refused = did.iter().filter(|one| one.ends_with("Err(\"policy excluded\")")).count();
        let known = did.iter().find(|one| one.starts_with("listening")).map(|one| one.split(',').count());
        (did.len(), refused, known)
    };
    let excess = usize::from(u16::MAX) - LISTENING_MAX;
    assert_eq!(
        counts(bench.receive(ToHost::Snapshot(all())).actions()),
        (excess + 1, excess, Some(LISTENING_MAX))
    );
    assert_eq!(
        bench.receive(ToHost::Opened(listener(60_000))).actions(),
        ["say result 60000 Err(\"policy excluded\")"]
    );
    assert_eq!(
        bench.receive(ToHost::Closed(at(60_000))).actions(),
        Vec::<String>::new(),
        "it was not passed on"
    );
    assert_eq!(bench.receive(ToHost::Closed(at(1))).actions(), ["listening [] closed [1]"]);
    assert_eq!(bench.receive(ToHost::Opened(listener(60_000))).actions(), ["listening [60000] closed []"]);
    // Listeners that were passed on stay, wherever they are in the next snapshot.
    let mut reversed = all();
    reversed.reverse();
    let did = bench.receive(ToHost::Snapshot(reversed)).actions();
    let known = did.iter().find(|one| one.starts_with("listening")).unwrap();
    assert!(known.starts_with("listening [60000, 1024, 1023, "), "{}", &known[..80]);
}

#[test]
fn results_are_sent_only_for_ports_announced_on_this_connection() {
    let mut bench = Bench::up(Extensions::NONE);
    let result = |port, result: Result<u16, &str>| {
        Input::Result(ForwardResult { port: at(port), result: result.map(at).map_err(str::to_owned) })
    };
    bench.on(result(5173, Ok(5173)));
    assert_eq!(bench.actions(), Vec::<String>::new());
    bench.receive(ToHost::Snapshot(vec![listener(5173), listener(8973)])).actions();
    bench.on(result(5173, Ok(5173))).on(result(8973, Err("policy excluded")));
    assert_eq!(bench.actions(), ["say result 5173 Ok(5173)", "say result 8973 Err(\"policy excluded\")"]);
    bench
        .receive(ToHost::ForwardRequest { target: at(4848), candidates: Vec::new(), reason: None })
        .actions();
    assert_eq!(bench.on(result(4848, Ok(4849))).actions(), ["say result 4848 Ok(4849)"]);
    bench.on(lost()).on(result(5173, Ok(5173)));
    bench.advance(Duration::from_secs(1)).connect(Extensions::NONE).actions();
    assert_eq!(bench.on(result(5173, Ok(5173))).actions(), Vec::<String>::new());
}

#[test]
fn a_dial_becomes_a_stream_when_the_container_has_connected() {
    let mut bench = Bench::up(Extensions::NONE);
    assert_eq!(bench.dial(41, 5173).dial(42, 8080).actions(), ["say open 1 to 5173", "say open 2 to 8080"]);
    assert_eq!(bench.receive(ack(2)).receive(ack(1)).actions(), ["begin 2 for 42", "begin 1 for 41"]);
    assert_eq!(bench.receive(data(1, "hello")).receive(data(1, "")).actions(), ["deliver 1 data hello"]);
    // A second answer has no effect.
    assert_eq!(bench.receive(ack(1)).receive(nack(1)).actions(), Vec::<String>::new());
}

#[test]
fn data_before_the_ack_is_kept_for_the_stream() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).receive(data(1, "early")).receive(ack(1)).receive(data(1, "late"));
    let expected = ["say open 1 to 5173", "deliver 1 data early", "begin 1 for 41", "deliver 1 data late"];
    assert_eq!(bench.actions(), expected);
}

#[test]
fn a_nack_refuses_its_dial_and_is_not_answered() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).actions();
    assert_eq!(bench.receive(nack(1)).actions(), ["cut 1", "refuse 41 Refused"]);
    assert_eq!(bench.advance(DIAL_MAX).actions(), Vec::<String>::new());
}

#[test]
fn a_close_ends_the_stream_once_and_is_not_answered() {
    let mut bench = Bench::up(Extensions::ALL);
    bench.dial(41, 5173).receive(ack(1)).actions();
    assert_eq!(bench.receive(closed(1)).actions(), ["deliver 1 close Upstream"]);
    bench.receive(data(1, "late")).receive(closed(1)).receive(ToHost::Relay(StreamId(1), Frame::Reset));
    assert_eq!(bench.actions(), Vec::<String>::new());
    assert_eq!(bench.on(Input::StreamEnded(StreamId(1))).actions(), Vec::<String>::new());
    // A stream that is still opening ends like a refused one.
    bench.dial(42, 5173).actions();
    assert_eq!(bench.receive(closed(2)).actions(), ["cut 2", "refuse 42 Refused"]);
}

#[test]
fn messages_for_unknown_streams_are_ignored_and_a_late_ack_is_answered_with_a_close() {
    let mut bench = Bench::up(Extensions::ALL);
    bench.receive(data(9, "x")).receive(closed(9)).receive(nack(9));
    assert_eq!(bench.actions(), Vec::<String>::new());
    for unknown in [9, 0, -1, i64::MIN, i64::MAX] {
        assert_eq!(bench.receive(ack(unknown)).actions(), [format!("say {unknown} close Downstream")]);
    }
}

#[test]
fn a_dial_times_out_and_its_late_connection_is_closed() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).advance(Duration::from_secs(1)).dial(42, 5173).actions();
    let first = bench.advance(DIAL_MAX - Duration::from_secs(1)).actions();
    assert_eq!(first, ["cut 1", "refuse 41 TimedOut", "say 1 close Downstream"]);
    bench.receive(ack(2)).advance(DIAL_MAX);
    assert_eq!(bench.actions(), ["begin 2 for 42"]);
    assert_eq!(bench.receive(ack(1)).actions(), ["say 1 close Downstream"]);
}

#[test]
fn an_answered_dial_has_no_deadline() {
    let mut bench = Bench::up(Extensions::NONE);
    bench
        .dial(41, 5173)
        .advance(Duration::from_secs(1))
        .dial(42, 5173)
        .advance(Duration::from_secs(1))
        .dial(43, 5173);
    bench.receive(ack(2));
    let first = bench.session.due().unwrap();
    bench.receive(ack(1));
    assert_eq!(bench.session.due().unwrap() - first, Duration::from_secs(2));
    bench.receive(nack(3));
    assert_eq!((bench.session.due(), bench.session.dials_due.len()), (None, 0));
}

#[test]
fn dials_of_a_closed_channel_are_refused() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).dial(42, 5173).receive(ack(2));
    bench.on(Input::Dial(DialKey { channel: 2, dial: 41 }, at(5173))).actions();
    let actions = bench.on(Input::ChannelClosed(1)).actions();
    assert_eq!(actions, ["cut 1", "refuse 41 Refused", "say 1 close Downstream"]);
    // Open streams continue, and so do dials of other channels.
    assert_eq!(bench.receive(data(2, "x")).receive(ack(3)).actions(), ["deliver 2 data x", "begin 3 for 41"]);
}

#[test]
fn a_loss_ends_streams_and_dials_except_completed_streams() {
    let mut bench = Bench::up(Extensions::NONE);
    for dial in [41, 42, 43] {
        bench.dial(dial, 5173);
    }
    bench.receive(ack(1)).receive(ack(2)).receive(data(2, "all")).receive(closed(2)).actions();
    let actions = bench.on(lost()).actions();
    assert_eq!(actions[..4], ["cut 1", "cut 3", "refuse 43 Refused", "down"]);
    assert_eq!(bench.dial(44, 5173).actions(), ["refuse 44 Refused"]);
    bench.on(lost()).on(Input::StreamEnded(StreamId(2)));
    assert_eq!(bench.actions(), Vec::<String>::new());
}

#[test]
fn stream_numbers_continue_after_a_loss_and_wrap_after_the_highest() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(1, 80).dial(2, 80).on(lost());
    bench.advance(Duration::from_secs(1)).connect(Extensions::NONE).actions();
    assert_eq!(bench.dial(3, 80).actions(), ["say open 3 to 80"]);
    bench.session.next_stream = STREAM_ID_MAX;
    bench.session.streams.insert(StreamId(1), Stream::Flushing);
    let highest = format!("say open {STREAM_ID_MAX} to 80");
    assert_eq!(
        bench.dial(4, 80).dial(5, 80).dial(6, 80).actions(),
        [&highest, "say open 2 to 80", "say open 4 to 80"]
    );
}

#[test]
fn dials_above_the_stream_limit_are_refused() {
    let mut bench = Bench::up(Extensions::NONE);
    for dial in 1..=STREAMS_MAX as u64 {
        bench.dial(dial, 80);
    }
    bench.receive(ack(1)).actions();
    assert_eq!(bench.dial(9_999, 80).actions(), ["refuse 9999 Exhausted"]);
    bench.on(Input::StreamEnded(StreamId(1))).actions();
    assert_eq!(bench.dial(9_999, 80).actions(), [format!("say open {} to 80", STREAMS_MAX + 1)]);
}

#[test]
fn frames_of_unused_extensions_are_ignored() {
    for (used, heard) in [(Extensions::NONE, 0), (Extensions::ALL, 4)] {
        let mut bench = Bench::up(used);
        bench.dial(41, 80).receive(ack(1)).actions();
        for frame in [Frame::Credit(5), Frame::Eof] {
            bench.receive(ToHost::Relay(StreamId(1), frame));
        }
        bench.on(Input::Binary(StreamId(1), Frame::Data(Bytes::from_static(b"x"))));
        bench.receive(ToHost::Relay(StreamId(1), Frame::Reset));
        assert_eq!(bench.actions().len(), heard);
    }
}

#[test]
fn a_stop_ends_all_streams_and_no_action_follows() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 80).dial(42, 80).dial(43, 80).receive(ack(1)).receive(ack(3)).receive(closed(3)).actions();
    let actions = bench.on(Input::Stop).actions();
    assert_eq!(actions, ["cut 1", "cut 2", "refuse 42 Refused", "cut 3", "disconnect", "notice stopped"]);
    bench.on(lost()).on(Input::Opened(None)).receive(ack(9)).on(Input::Stop).advance(Duration::from_secs(60));
    assert_eq!(bench.actions(), Vec::<String>::new());
    assert_eq!(bench.dial(44, 80).actions(), ["refuse 44 Refused"]);
    assert_eq!(bench.session.due(), None);
}

#[test]
fn a_stop_ends_a_connection_attempt() {
    let mut bench = Bench::new(Extensions::NONE);
    bench.advance(Duration::ZERO);
    assert_eq!(bench.on(Input::Stop).actions(), ["connect", "disconnect", "notice stopped"]);
    assert_eq!(
        bench.on(Input::Opened(None)).advance(Duration::from_secs(60)).actions(),
        Vec::<String>::new()
    );
}

mod model;
