//! Random histories of containers against a model of an engine that carries out every command.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::model::announcement::Announced;

const NAMES: [&str; 3] = ["a", "b", "c"];
/// This container cannot be entered: its ports are known from its session alone.
const FAR: usize = 2;
const PORTS: [u16; 5] = [80, 3000, 3001, 5173, 8973];

#[derive(Clone, Copy, Debug)]
enum Step {
    Register(usize),
    Deregister(usize),
    Start(usize),
    Die(usize),
    Listen(usize, usize),
    Unlisten(usize, usize),
    /// A program on the host binds a port, or closes it.
    Host(usize),
    Answer,
    Wait,
    /// The engine is killed; the driver gets another one.
    EngineKilled,
    /// The driver is killed; the next one attaches to the same engine.
    DriverKilled,
    Sweep,
    /// A broker's session starts and announces the listening ports.
    Session(usize),
    SessionLost(usize),
    BrokerStops(usize),
    /// The container reserves a host port for one of its ports.
    Reserve(usize, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (who, what) = (0..NAMES.len(), 0..PORTS.len());
    let brokered = who.clone();
    let step = prop_oneof![
        1 => who.clone().prop_map(Step::Register),
        1 => who.clone().prop_map(Step::Deregister),
        3 => who.clone().prop_map(Step::Start),
        1 => who.clone().prop_map(Step::Die),
        6 => (who.clone(), what.clone()).prop_map(|(who, what)| Step::Listen(who, what)),
        3 => (who, what.clone()).prop_map(|(who, what)| Step::Unlisten(who, what)),
        1 => what.clone().prop_map(Step::Host),
        8 => Just(Step::Answer),
        2 => Just(Step::Wait),
        1 => Just(Step::EngineKilled),
        1 => Just(Step::DriverKilled),
        1 => Just(Step::Sweep),
        3 => brokered.clone().prop_map(Step::Session),
        1 => brokered.clone().prop_map(Step::SessionLost),
        1 => brokered.clone().prop_map(Step::BrokerStops),
        2 => (brokered, what).prop_map(|(who, what)| Step::Reserve(who, what)),
    ];
    prop::collection::vec(step, 0..80)
}

#[derive(Default)]
struct Container {
    registered: bool,
    /// The cookie of its namespace while it runs.
    cookie: Option<u64>,
    listening: BTreeSet<u16>,
    /// Whether its broker has a session.
    up: bool,
    /// The number of results that it waits for, by port.
    unanswered: BTreeMap<u16, usize>,
}

struct World {
    planner: Planner,
    now: Instant,
    containers: [Container; NAMES.len()],
    order: Vec<usize>,
    cookies: u64,
    host: BTreeSet<u16>,
    /// The state of the engine.
    upstreams: BTreeMap<UpstreamId, u64>,
    forwards: BTreeMap<ForwardId, (UpstreamId, u16)>,
    /// Commands that the engine has not carried out.
    queue: std::collections::VecDeque<Command>,
    used: BTreeSet<ForwardId>,
    used_upstreams: BTreeSet<UpstreamId>,
}

impl World {
    fn new() -> World {
        World {
            planner: Planner::new(ControlPorts::default()),
            now: Instant::now(),
            containers: Default::default(),
            order: Vec::new(),
            cookies: 0,
            host: BTreeSet::new(),
            upstreams: BTreeMap::new(),
            forwards: BTreeMap::new(),
            queue: std::collections::VecDeque::new(),
            used: BTreeSet::new(),
            used_upstreams: BTreeSet::new(),
        }
    }

    fn desired_containers(&self) -> Vec<DesiredContainer> {
        self.order.iter().map(|who| desired(NAMES[*who], None)).collect()
    }

    fn rows(&self, cookie: u64) -> Vec<Listening> {
        let container = self.containers.iter().find(|container| container.cookie == Some(cookie));
        let ports = container.map(|container| container.listening.iter()).unwrap_or_default();
        ports.map(|number| row(*number, "127.0.0.1", u64::from(*number))).collect()
    }

    /// Enters a container that runs and is registered.
    fn enter(&mut self, who: usize) {
        let reachable = self.containers[who].registered && who != FAR;
        let Some(cookie) = self.containers[who].cookie.filter(|_| reachable) else { return };
        match self.planner.container_entered(&name(NAMES[who]), cookie) {
            Admission::Add(upstream) => {
                assert!(self.used_upstreams.insert(upstream), "{upstream} is used twice");
                self.queue.push_back(Command::AddUpstream {
                    upstream,
                    netns_cookie: cookie,
                    sources: landfall_engine::command::WatchSources::default(),
                    kind: landfall_engine::command::UpstreamKind::Opener,
                });
            }
            Admission::Known(_) => {}
            other => panic!("{other:?}"),
        }
    }

    fn enter_all(&mut self) {
        (0..NAMES.len()).for_each(|who| self.enter(who));
    }

    /// Announces the change of a session's ports, or all of them.
    fn announce(&mut self, who: usize, opened: &[u16], closed: &[u16], whole: bool) {
        if !self.containers[who].up {
            return;
        }
        for number in opened {
            *self.containers[who].unanswered.entry(*number).or_default() += 1;
        }
        let opened: Vec<Announced> =
            opened.iter().map(|number| Announced { port: port(*number), loopback: true }).collect();
        let closed: Vec<NonZeroU16> = closed.iter().map(|number| port(*number)).collect();
        let changes = self.planner.announce(&name(NAMES[who]), &opened, &closed, whole, self.now);
        self.check_changes(&changes);
    }

    fn check_changes(&mut self, changes: &[Change]) {
        for change in changes {
            let Change::Result { name: to, result } = change else { continue };
            let who = NAMES.iter().position(|text| *to == name(text)).unwrap();
            let unanswered = self.containers[who].unanswered.entry(result.port.get()).or_default();
            assert!(self.containers[who].up && *unanswered > 0, "{change:?} was not requested");
            *unanswered -= 1;
        }
    }

    fn lose_session(&mut self, who: usize) {
        self.containers[who].up = false;
        self.containers[who].unanswered.clear();
    }

    fn observe(&mut self, who: usize, number: u16, opened: bool) {
        let (begins, ends): (&[u16], &[u16]) = if opened { (&[number], &[]) } else { (&[], &[number]) };
        self.announce(who, begins, ends, false);
        let Some(cookie) = self.containers[who].cookie else { return };
        let rows = vec![row(number, "127.0.0.1", u64::from(number))];
        let upstreams: Vec<UpstreamId> =
            self.upstreams.iter().filter(|(_, known)| **known == cookie).map(|(id, _)| *id).collect();
        for upstream in upstreams {
            let (opened, closed) =
                if opened { (rows.clone(), Vec::new()) } else { (Vec::new(), rows.clone()) };
            self.planner.on_engine_event(&Event::Listeners { upstream, opened, closed }, self.now);
        }
    }

    fn inventory(&self) -> Inventory {
        let upstreams = self.upstreams.iter();
        let observed = self.upstreams.iter().map(|(id, cookie)| (*id, self.rows(*cookie))).collect();
        Inventory {
            upstreams: upstreams
                .map(|(id, cookie)| UpstreamState { upstream: *id, netns_cookie: *cookie })
                .collect(),
            forwards: self
                .forwards
                .iter()
                .map(|(id, (upstream, number))| held(id.0, upstream.0, *number))
                .collect(),
            observed,
        }
    }

    /// Makes the engine carry out one command.
    fn carry_out(&mut self) -> bool {
        let Some(command) = self.queue.pop_front() else { return false };
        let events = match command {
            Command::AddUpstream { upstream, netns_cookie, .. } => {
                self.upstreams.insert(upstream, netns_cookie);
                let opened = self.rows(netns_cookie);
                vec![Event::Listeners { upstream, opened, closed: Vec::new() }]
            }
            Command::RemoveUpstream { upstream, .. } => {
                let gone: Vec<ForwardId> = self
                    .forwards
                    .iter()
                    .filter(|(_, (into, _))| *into == upstream)
                    .map(|(id, _)| *id)
                    .collect();
                let mut events: Vec<Event> = gone.iter().map(|id| closed_event(*id)).collect();
                self.forwards.retain(|id, _| !gone.contains(id));
                self.upstreams.remove(&upstream);
                events.push(Event::UpstreamRemoved { upstream, reason: None });
                events
            }
            Command::OpenListener { forward, upstream, host_port, .. } => {
                assert!(self.used.insert(forward), "{forward} is used twice");
                assert!(self.upstreams.contains_key(&upstream), "{upstream} does not exist");
                assert!(host_port.get() >= 1024 && host_port.get() != 8973, "{host_port} is guarded");
                let number = host_port.get();
                let twice = self.forwards.values().any(|(_, taken)| *taken == number);
                assert!(!twice, "two live forwards on {number}");
                if self.host.contains(&number) {
                    let failure = ListenFailure {
                        kind: ListenFailureKind::Taken,
                        address: "127.0.0.1:1".parse().unwrap(),
                        detail: "EADDRINUSE".to_owned(),
                    };
                    vec![Event::ListenerFailed { forward, host_port, failure }]
                } else {
                    self.forwards.insert(forward, (upstream, number));
                    vec![Event::ListenerOpened { forward, host_port }]
                }
            }
            Command::CloseListener { forward, .. } => {
                self.forwards.remove(&forward);
                vec![closed_event(forward)]
            }
            _ => Vec::new(),
        };
        for event in events {
            let changes = self.planner.on_engine_event(&event, self.now);
            self.check_changes(&changes);
        }
        true
    }

    fn plan(&mut self) {
        let (commands, changes) = self.planner.step(self.now);
        self.queue.extend(commands);
        self.check_changes(&changes);
        for (who, text) in NAMES.iter().enumerate() {
            let enterable = who != FAR && self.containers[who].cookie.is_some();
            if let Some((upstream, netns_cookie)) =
                (!enterable).then(|| self.planner.dial(&name(text))).flatten()
            {
                assert!(self.used_upstreams.insert(upstream), "{upstream} is used twice");
                self.queue.push_back(Command::AddUpstream {
                    upstream,
                    netns_cookie,
                    sources: landfall_engine::command::WatchSources::default(),
                    kind: landfall_engine::command::UpstreamKind::Dialler,
                });
            }
        }
        let (commands, changes) = self.planner.step(self.now);
        self.queue.extend(commands);
        self.check_changes(&changes);
        assert_idle(&mut self.planner, self.now);
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Register(who) if !self.containers[who].registered => {
                self.containers[who].registered = true;
                self.order.push(who);
                self.planner.desired(self.desired_containers());
                self.enter(who);
            }
            Step::Deregister(who) => {
                self.containers[who].registered = false;
                self.order.retain(|one| *one != who);
                self.planner.desired(self.desired_containers());
            }
            Step::Start(who) if self.containers[who].cookie.is_none() => {
                self.cookies += 1;
                self.containers[who].cookie = Some(self.cookies);
                self.enter(who);
            }
            Step::Die(who) => {
                self.containers[who].cookie = None;
                let ended: Vec<u16> =
                    std::mem::take(&mut self.containers[who].listening).into_iter().collect();
                self.announce(who, &[], &ended, false);
                self.planner.container_lost(&name(NAMES[who]));
            }
            Step::Listen(who, what) if self.containers[who].cookie.is_some() => {
                if self.containers[who].listening.insert(PORTS[what]) {
                    self.observe(who, PORTS[what], true);
                }
            }
            Step::Unlisten(who, what) => {
                if self.containers[who].listening.remove(&PORTS[what]) {
                    self.observe(who, PORTS[what], false);
                }
            }
            Step::Host(what) => {
                let number = PORTS[what];
                let forwarded = self.forwards.values().any(|(_, taken)| *taken == number);
                if !self.host.remove(&number) && !forwarded {
                    self.host.insert(number);
                }
            }
            Step::Answer => drop(self.carry_out()),
            Step::Wait => self.now += LINGER,
            Step::EngineKilled => {
                self.planner.detach();
                (self.upstreams, self.forwards, self.queue) = Default::default();
                self.planner.attach(Inventory::default());
                self.enter_all();
            }
            Step::DriverKilled => {
                // Commands that were sent before still arrive.
                while self.carry_out() {}
                let (next_upstream, next_forward) = (self.planner.next_upstream, self.planner.next_forward);
                self.planner = Planner::new(ControlPorts::default());
                self.planner.desired(self.desired_containers());
                self.planner.attach(self.inventory());
                (0..NAMES.len()).for_each(|who| self.lose_session(who));
                // A new driver knows only the ids that the engine holds, so a free id may be used again.
                self.used.retain(|id| id.0 < self.planner.next_forward);
                self.used_upstreams.retain(|id| id.0 < self.planner.next_upstream);
                assert!(
                    self.planner.next_upstream <= next_upstream && self.planner.next_forward <= next_forward
                );
                self.enter_all();
            }
            Step::Sweep => self.planner.sweep(),
            Step::Session(who) if !self.containers[who].up => {
                self.containers[who].up = true;
                self.planner.broker_up(&name(NAMES[who]));
                let all: Vec<u16> = self.containers[who].listening.iter().copied().collect();
                self.announce(who, &all, &[], true);
            }
            Step::SessionLost(who) => {
                self.lose_session(who);
                self.planner.broker_down(&name(NAMES[who]));
            }
            Step::BrokerStops(who) => {
                self.lose_session(who);
                self.planner.broker_stopped(&name(NAMES[who]));
            }
            Step::Reserve(who, what) if self.containers[who].up => {
                *self.containers[who].unanswered.entry(PORTS[what]).or_default() += 1;
                let candidates = vec![port(PORTS[(what + 1) % PORTS.len()]), port(3500)];
                let changes = self.planner.reserve(&name(NAMES[who]), port(PORTS[what]), candidates);
                self.check_changes(&changes);
            }
            Step::Register(_) | Step::Start(_) | Step::Listen(..) | Step::Session(_) | Step::Reserve(..) => {}
        }
        self.plan();
    }

    /// Frees the host ports that other programs hold, sweeps, and carries out all commands during eight retry pauses.
    fn run_to_rest(&mut self) {
        self.host.clear();
        self.planner.sweep();
        for _ in 0..8 {
            self.plan();
            while self.carry_out() {
                self.plan();
            }
            self.now += RETRY;
        }
    }

    /// Without brokers, exactly the wanted ports are open, each for the right container.
    fn check(&self) {
        let wants = |who: usize, number: u16| {
            let container = &self.containers[who];
            let entered = container.registered && container.cookie.is_some() && who != FAR;
            entered && container.listening.contains(&number)
        };
        for number in PORTS {
            let wanted = number >= 1024
                && number != 8973
                && self.containers.iter().enumerate().any(|(who, _)| wants(who, number));
            let open: Vec<UpstreamId> = self
                .forwards
                .values()
                .filter(|(_, taken)| *taken == number)
                .map(|(upstream, _)| *upstream)
                .collect();
            assert_eq!(open.len(), usize::from(wanted), "port {number}");
            for upstream in open {
                let cookie = self.upstreams[&upstream];
                let owner =
                    self.containers.iter().position(|container| container.cookie == Some(cookie)).unwrap();
                assert!(wants(owner, number), "port {number} leads to {}", NAMES[owner]);
                assert!(self.planner.open_ports(&name(NAMES[owner])).contains(&port(number)));
            }
        }
        let namespaces: BTreeSet<u64> = self.upstreams.values().copied().collect();
        assert_eq!(namespaces.len(), self.upstreams.len(), "a namespace is held twice");
        assert_eq!(self.planner.due(), None, "no plan is due");
    }
}

fn closed_event(forward: ForwardId) -> Event {
    Event::ListenerClosed { forward, stats: ForwardStats::default() }
}

proptest! {
    #[test]
    fn every_wanted_port_is_open_in_the_end_and_invariants_hold(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
        }
        world.run_to_rest();
        for who in 0..NAMES.len() {
            world.take(Step::BrokerStops(who));
        }
        world.run_to_rest();
        world.check();
    }
}
