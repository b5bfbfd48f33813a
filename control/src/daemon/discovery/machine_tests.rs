use super::*;
use crate::docker::Network;
use crate::docker::labels::{ContainerLabels, ImageLabels};
use proptest::prelude::*;

const FORWARD: (&str, &str) = ("dev.landfall.forward", "true");

fn name(text: &str) -> ContainerName {
    ContainerName::new(text).unwrap()
}

/// Returns the labels of a container whose image has no labels.
fn given(labels: &[(&str, &str)]) -> ContainerLabels {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    ContainerLabels::new(labels.collect(), ImageLabels::Known(BTreeMap::new()))
}

/// Returns a container that runs. A smaller id is an older container.
fn container(id: &str, docker_name: &str, labels: &[(&str, &str)]) -> Listed {
    Listed {
        id: id.to_owned(),
        name: name(docker_name),
        is_between_names: false,
        image: "image".to_owned(),
        running: true,
        labels: given(labels),
        network: Network::Own,
        created: id.parse().unwrap(),
        published: BTreeMap::new(),
    }
}

fn stopped(container: Listed) -> Listed {
    Listed { running: false, ..container }
}

/// Returns a registration that a client made with this attach method.
fn registered(docker_name: &str, attach_method: Option<AttachMethod>) -> Registration {
    Registration {
        attach_method,
        discovered: None,
        ..registration(&name(docker_name), &name(docker_name), "", FoundBy::Label)
    }
}

fn attached(docker_name: &str, id: Option<&str>) -> Registration {
    let discovered = Some(Discovered { by: FoundBy::Name, id: id.map(str::to_owned) });
    Registration { discovered, ..registered(docker_name, Some(AttachMethod::DOCKER)) }
}

fn read(listed: &[Listed]) -> Vec<Candidate> {
    listed.iter().map(|container| Candidate::new(container.clone(), &[])).collect()
}

/// Returns the registrations after the steps of a decision, and the decision.
fn after(listed: &[Listed], before: Vec<Registration>, all: bool) -> (Vec<Registration>, Decision) {
    let mut known = Registered { entries: before.into_iter().map(Arc::new).collect() };
    let listed = read(listed);
    let judged = judge(&listed, &known, all);
    apply(&mut known, &judged.steps);
    let again = judge(&listed, &known, all);
    assert_eq!(again.steps, [], "steps remain: {judged:?}");
    assert_eq!(again.verdicts, judged.verdicts);
    (known.entries.iter().map(|entry| Registration::clone(entry)).collect(), judged)
}

fn apply(known: &mut Registered, steps: &[Step]) {
    for step in steps {
        match step {
            Step::Move { from, registration, before } => {
                let (registration, before) = (registration.clone(), before.clone());
                apply(known, &[Step::Register { registration, before }, Step::Drop(Arc::clone(from))]);
            }
            Step::Drop(gone) => known.entries.retain(|entry| !Arc::ptr_eq(entry, gone)),
            Step::Register { registration, before } => {
                let current = known.find(&registration.container_name.to_string()).cloned();
                assert_eq!(current.as_ref().map(Arc::as_ptr), before.as_ref().map(Arc::as_ptr));
                known.entries.retain(|entry| entry.container_name != registration.container_name);
                known.entries.push(Arc::new(Registration::clone(registration)));
            }
        }
    }
}

/// Returns the name, Docker's name and the id of each registration.
fn summary(registrations: &[Registration]) -> Vec<(String, String, Option<String>)> {
    let short = |one: &Registration| {
        let id = one.discovered.as_ref().and_then(|discovered| discovered.id.clone());
        (one.container_name.to_string(), one.docker_name().to_string(), id)
    };
    registrations.iter().map(short).collect()
}

fn entry(name: &str, docker: &str, id: &str) -> (String, String, Option<String>) {
    (name.to_owned(), docker.to_owned(), Some(id.to_owned()))
}

fn not_forwarded(why: NotForwardedReason) -> Verdict {
    Verdict::Not(why)
}

#[test]
fn a_labelled_container_is_forwarded_and_one_without_a_label_is_not_requested() {
    let listed = [container("1", "shop", &[FORWARD]), container("2", "db", &[])];
    let (known, judged) = after(&listed, vec![], false);
    assert_eq!(summary(&known), [entry("shop", "shop", "1")]);
    assert_eq!(
        judged.verdicts,
        [Verdict::Forwarded(name("shop"), FoundBy::Label), not_forwarded(NotForwardedReason::NotRequested)]
    );
    assert_eq!(judged.notices, []);
}

#[test]
fn all_containers_are_forwarded_except_excluded_ones_and_the_daemons_own() {
    let listed = [
        container("1", "shop", &[]),
        container("2", "db", &[("dev.landfall.forward", "no")]),
        container("3", "landfall-helper-0", &[("dev.landfall.helper", "")]),
        container("4", "odd", &[("dev.landfall.forward", "perhaps")]),
    ];
    let (known, judged) = after(&listed, vec![], true);
    assert_eq!(summary(&known), [entry("odd", "odd", "4"), entry("shop", "shop", "1")]);
    assert_eq!(
        judged.verdicts[1..3],
        [not_forwarded(NotForwardedReason::Excluded), not_forwarded(NotForwardedReason::Helper)]
    );
    assert_eq!(judged.notices.len(), 1);
    // Without --all, registrations that only --all requested are dropped.
    assert_eq!(after(&listed, known, false).0, []);
}

#[test]
fn c23_a_label_of_the_image_forwards_nothing() {
    let all = || given(&[FORWARD, ("dev.landfall.name", "web")]);
    let of_image = ContainerLabels::of_image(BTreeMap::from([(FORWARD.0.to_owned(), FORWARD.1.to_owned())]));
    let inherited = Listed { labels: of_image, ..container("1", "shop", &[]) };
    let unknown = ContainerLabels::new(
        BTreeMap::from([(FORWARD.0.to_owned(), FORWARD.1.to_owned())]),
        ImageLabels::Unknown,
    );
    let unknown = Listed { labels: unknown, ..container("2", "db", &[]) };
    let own = Listed { labels: all(), ..container("3", "x", &[]) };
    let listed = [inherited, unknown, own];
    let (known, judged) = after(&listed, vec![], false);
    assert_eq!(summary(&known), [entry("web", "x", "3")]);
    let not_own = |origin| not_forwarded(NotForwardedReason::ImageLabel(origin));
    assert_eq!(judged.verdicts[..2], [not_own(LabelOrigin::Image), not_own(LabelOrigin::Unknown)]);
    // A registration that an earlier release made for such a label is dropped.
    let before = registration(&name("shop"), &name("shop"), "1", FoundBy::Label);
    assert_eq!(summary(&after(&listed, vec![before], false).0), [entry("web", "x", "3")]);
    let (known, _) = after(&listed, vec![], true);
    assert_eq!(summary(&known).len(), 3, "all are forwarded");
}

#[test]
fn labels_choose_name_and_ports() {
    let labels = [FORWARD, ("dev.landfall.name", "web"), ("dev.landfall.allow", "3000")];
    let (known, _) = after(&[container("1", "shop", &labels)], vec![], false);
    assert_eq!(summary(&known), [entry("web", "shop", "1")]);
    let policy = serde_json::to_value(known[0].port_forward.as_ref().unwrap()).unwrap();
    assert_eq!(policy, serde_json::json!({"allow": [3000]}));
}

#[test]
fn labels_are_read_once_for_each_container() {
    let shop = container("1", "shop", &[FORWARD]);
    let first = Candidate::new(shop.clone(), &[]);
    let again = Candidate::new(stopped(shop.clone()), std::slice::from_ref(&first));
    assert!(Arc::ptr_eq(&first.labels, &again.labels) && !again.container.running);
    let other = Listed { labels: given(&[]), ..shop };
    assert_eq!(Candidate::new(other, &[first]).labels.forward, None);
}

#[test]
fn an_invalid_list_of_ports_prevents_forwarding() {
    let listed = [container("1", "shop", &[FORWARD, ("dev.landfall.deny", "ssh")])];
    let (known, judged) = after(&listed, vec![], true);
    assert_eq!(known, []);
    assert!(matches!(&judged.verdicts[..], [Verdict::Not(NotForwardedReason::InvalidPorts(_))]));
    assert!(judged.notices[0].text.starts_with("container shop: no port is forwarded, since"));
}

#[test]
fn a_registration_is_made_when_the_container_runs_and_dropped_when_it_is_gone() {
    let shop = container("1", "shop", &[FORWARD]);
    let (known, judged) = after(&[stopped(shop.clone())], vec![], false);
    assert_eq!(
        (known.len(), &judged.verdicts[..]),
        (0, &[not_forwarded(NotForwardedReason::NotRunning)][..])
    );
    let (known, _) = after(std::slice::from_ref(&shop), known, false);
    assert_eq!(known.len(), 1);
    let (known, _) = after(&[stopped(shop)], known, false);
    assert_eq!(known.len(), 1, "it may be started again");
    assert_eq!(after(&[], known, false).0, []);
}

#[test]
fn a_recreated_container_is_registered_by_its_new_labels() {
    let (known, _) = after(&[container("1", "shop", &[FORWARD])], vec![], false);
    let other = [container("2", "shop", &[FORWARD, ("dev.landfall.allow", "80")])];
    let (known, _) = after(&other, known, false);
    assert_eq!(summary(&known), [entry("shop", "shop", "2")]);
    assert!(known[0].port_forward.is_some());
    assert_eq!(after(&[container("3", "shop", &[])], known, false).0, []);
}

#[test]
fn a_labelled_container_moves_to_its_new_name() {
    let (known, _) = after(&[container("1", "shop", &[FORWARD])], vec![], false);
    let (known, judged) = after(&[container("1", "store", &[FORWARD])], known, false);
    assert_eq!(summary(&known), [entry("store", "store", "1")]);
    let [step @ Step::Move { from, .. }] = &judged.steps[..] else { panic!("{:?}", judged.steps) };
    assert_eq!(from.container_name, name("shop"));
    assert!(step.names().eq([&name("store"), &name("shop")]));
    // A different container is a new registration, not a move.
    let (_, judged) = after(&[container("2", "shop-2", &[FORWARD])], known, false);
    assert!(matches!(&judged.steps[..], [Step::Register { .. }, Step::Drop(_)]), "{:?}", judged.steps);
}

#[test]
fn an_attached_registration_moves_with_its_container() {
    let policy =
        Some(PortForward { deny: Some([std::num::NonZeroU16::MIN].into()), ..PortForward::default() });
    let shop = Registration { port_forward: policy.clone(), ..attached("shop", Some("1")) };
    let (known, judged) = after(&[container("1", "store", &[])], vec![shop], false);
    assert_eq!(summary(&known), [entry("store", "store", "1")]);
    assert!(matches!(&judged.steps[..], [Step::Move { .. }]), "{:?}", judged.steps);
    assert_eq!(known[0].port_forward, policy);
    assert_eq!(judged.verdicts, [Verdict::Forwarded(name("store"), FoundBy::Name)]);
}

#[test]
fn a_move_that_was_half_executed_is_completed() {
    let before = vec![attached("shop", Some("1")), attached("store", Some("1"))];
    let (known, judged) = after(&[container("1", "store", &[])], before, false);
    assert_eq!(summary(&known), [entry("store", "store", "1")]);
    assert_eq!((judged.steps.len(), judged.notices), (1, vec![]));
}

#[test]
fn a_chosen_name_stays_when_its_container_is_renamed() {
    let web = Registration {
        attach_method: Some(AttachMethod::Docker { container: Some(name("shop")) }),
        ..attached("web", Some("1"))
    };
    let (known, _) = after(&[container("1", "store", &[])], vec![web], false);
    assert_eq!(summary(&known), [entry("web", "store", "1")]);
}

#[test]
fn an_attached_name_follows_the_next_container_of_that_name() {
    let (known, _) = after(&[container("2", "shop", &[])], vec![attached("shop", Some("1"))], false);
    assert_eq!(summary(&known), [entry("shop", "shop", "2")]);
    // Also if the old container still exists under another name.
    let both = [container("1", "shop-old", &[]), container("2", "shop", &[])];
    let (known, _) = after(&both, vec![attached("shop", Some("1"))], false);
    assert_eq!(summary(&known), [entry("shop", "shop", "2")]);
    let (known, _) = after(&[container("2", "shop", &[])], vec![attached("shop", None)], false);
    assert_eq!(summary(&known), [entry("shop", "shop", "2")]);
}

#[test]
fn an_attached_name_is_kept_without_a_container() {
    let before = vec![attached("shop", Some("1"))];
    let (known, judged) = after(&[], before.clone(), false);
    assert_eq!((known, judged.steps), (before, vec![]));
}

#[test]
fn an_attached_registration_does_not_move_to_a_registered_name() {
    let before = vec![attached("shop", Some("1")), registered("store", None)];
    let (known, judged) = after(&[container("1", "store", &[])], before.clone(), false);
    assert_eq!(known, before);
    assert!(judged.notices[0].text.starts_with("Docker now calls shop store; it stays attached as shop"));
}

#[test]
fn a_container_that_is_being_replaced_keeps_its_registration() {
    let aside = container("1", "shop.landfall-old", &[FORWARD]);
    let before = vec![attached("shop", Some("1"))];
    assert_eq!(after(std::slice::from_ref(&aside), before.clone(), false).0, before);
    let (labelled, _) = after(&[container("1", "shop", &[FORWARD])], vec![], false);
    assert_eq!(after(std::slice::from_ref(&aside), labelled.clone(), false).0, labelled);
    let new = stopped(container("2", "shop", &[FORWARD]));
    let (known, _) = after(&[aside.clone(), new.clone()], before, false);
    assert_eq!(summary(&known), [entry("shop", "shop", "2")]);
    // The old container no longer counts, and the new one is registered when it runs.
    let (known, judged) = after(&[aside, Listed { running: true, ..new }], labelled, false);
    assert_eq!(summary(&known), [entry("shop", "shop", "2")]);
    assert_eq!(judged.notices, []);
}

#[test]
fn a_name_goes_to_its_holder_then_to_the_running_then_to_the_older_container() {
    let web = [FORWARD, ("dev.landfall.name", "web")];
    let (one, two) = (container("1", "one", &web), container("2", "two", &web));
    let (known, judged) = after(&[two.clone(), one.clone()], vec![], false);
    assert_eq!(summary(&known), [entry("web", "one", "1")]);
    let text = "container two is not forwarded: container one has the name web".to_owned();
    assert_eq!(judged.notices, [Notice { id: "2".to_owned(), text }]);
    let (known, _) = after(&[stopped(one.clone()), two.clone()], known, false);
    assert_eq!(summary(&known), [entry("web", "one", "1")]);
    let (known, _) = after(&[stopped(one.clone()), two.clone()], vec![], false);
    assert_eq!(summary(&known), [entry("web", "two", "2")]);
    let (known, _) = after(&[one, two.clone()], known, false);
    assert_eq!(summary(&known), [entry("web", "two", "2")]);
    assert_eq!(summary(&after(&[two], known, false).0), [entry("web", "two", "2")]);
}

#[test]
fn a_registration_of_a_client_is_not_changed() {
    for attach_method in [None, Some(AttachMethod::DOCKER), Some(AttachMethod::Websocket)] {
        let before = vec![registered("shop", attach_method)];
        let (known, judged) = after(&[container("1", "shop", &[FORWARD])], before.clone(), true);
        assert_eq!(known, before);
        assert_eq!(judged.verdicts, [Verdict::Registered(name("shop"))]);
        assert_eq!(judged.notices, []);
    }
    let before = vec![registered("shop", Some(AttachMethod::Netns { path: "/n".into() }))];
    let (known, judged) = after(&[container("1", "shop", &[FORWARD])], before.clone(), false);
    assert_eq!(known, before);
    assert!(matches!(&judged.verdicts[..], [Verdict::Not(NotForwardedReason::NameTaken { .. })]));
    assert_eq!(judged.notices.len(), 1);
}

#[test]
fn attach_overrides_labels() {
    let listed = [container("1", "shop", &[FORWARD, ("dev.landfall.name", "web")])];
    let (known, _) = after(&listed, vec![attached("shop", Some("1"))], true);
    assert_eq!(summary(&known), [entry("shop", "shop", "1")]);
    let excluded = [container("1", "shop", &[("dev.landfall.forward", "false")])];
    assert_eq!(after(&excluded, vec![attached("shop", Some("1"))], false).0.len(), 1);
}

fn detached(
    docker_name: &str,
    listed: &[Listed],
    before: &[Registration],
    all: bool,
) -> (Detach, Vec<Registration>) {
    let mut known = Registered { entries: before.iter().cloned().map(Arc::new).collect() };
    let done = detach(&name(docker_name), &read(listed), &known, all);
    if let Detach::Forget(step) | Detach::TurnOff(step) = &done {
        apply(&mut known, std::slice::from_ref(step));
    }
    let known = known.entries.iter().map(|entry| Registration::clone(entry)).collect();
    (done, after(listed, known, all).0)
}

#[test]
fn detach_drops_an_attached_registration() {
    let shop = [container("1", "shop", &[])];
    let (done, known) = detached("shop", &shop, &[attached("shop", Some("1"))], false);
    assert!(matches!(done, Detach::Forget(_)));
    assert_eq!(known, []);
    // Also if Docker no longer lists it, or is unreachable.
    assert_eq!(detached("shop", &[], &[attached("shop", Some("1"))], true).1, []);
}

#[test]
fn a_container_that_would_be_forwarded_again_is_turned_off() {
    let shop = [container("1", "shop", &[FORWARD])];
    let (labelled, _) = after(&shop, vec![], false);
    let off = |known: &[Registration]| known.len() == 1 && known[0].port_forward.as_ref().unwrap().is_off();
    for before in [labelled, vec![attached("shop", Some("1"))], vec![]] {
        let stopped = [stopped(shop[0].clone())];
        let (done, known) =
            detached("shop", if before.is_empty() { &stopped } else { &shop }, &before, false);
        assert!(matches!(done, Detach::TurnOff(_)), "{done:?}");
        assert!(off(&known));
        assert_eq!(known[0].discovered.as_ref().unwrap().by, FoundBy::Name);
        let (done, known) = detached("shop", &shop, &known, false);
        assert_eq!(done, Detach::IsOff(name("shop")));
        // A recreated container stays off. When it is gone, the registration may be dropped.
        let (known, judged) = after(&[container("2", "shop", &[FORWARD])], known, true);
        assert!(off(&known));
        assert_eq!(judged.verdicts, [Verdict::Off(name("shop"))]);
        assert_eq!(detached("shop", &[], &known, true).1, []);
    }
}

#[test]
fn detach_accepts_dockers_name() {
    let shop = [container("1", "shop", &[FORWARD, ("dev.landfall.name", "web")])];
    let (known, _) = after(&shop, vec![], false);
    let (_, known) = detached("shop", &shop, &known, false);
    assert_eq!(summary(&known), [entry("web", "shop", "1")]);
    assert!(known[0].port_forward.as_ref().unwrap().is_off());
}

#[test]
fn a_container_that_the_daemon_does_not_forward_cannot_be_detached() {
    let shop = [container("1", "shop", &[])];
    let refusal = |before: &[Registration], listed: &[Listed]| match detached("shop", listed, before, false).0
    {
        Detach::Refused(why) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(refusal(&[], &shop), "shop is not forwarded");
    assert_eq!(refusal(&[], &[]), "not registered: shop");
    let why = refusal(&[registered("shop", None)], &shop);
    assert_eq!(why, "shop was registered by name and folder; deregister it instead");
}

/// Generates containers with few names, labels and ids, so that they collide.
fn any_container() -> impl Strategy<Value = Listed> {
    let labels = prop_oneof![
        Just(vec![]),
        Just(vec![FORWARD]),
        Just(vec![FORWARD, ("dev.landfall.name", "a")]),
        Just(vec![("dev.landfall.forward", "false")]),
        Just(vec![("dev.landfall.deny", "x")]),
        Just(vec![("dev.landfall.helper", "1")]),
    ];
    let names = prop_oneof![Just("a"), Just("b"), Just("c"), Just("a.landfall-old")];
    (0..6_i32, names, labels, any::<bool>()).prop_map(
        |(id, docker_name, labels, running): (i32, &str, Vec<_>, bool)| Listed {
            running,
            ..container(&id.to_string(), docker_name, &labels)
        },
    )
}

fn any_registration() -> impl Strategy<Value = Registration> {
    let id = || proptest::option::of((0..6).prop_map(|id: i32| id.to_string()));
    let names = || prop_oneof![Just("a"), Just("b"), Just("c")];
    prop_oneof![
        (names(), id()).prop_map(|(docker_name, id)| attached(docker_name, id.as_deref())),
        names().prop_map(|docker_name| registered(docker_name, None)),
        (names(), names(), id()).prop_map(|(docker_name, docker, id)| {
            registration(&name(docker_name), &name(docker), &id.unwrap_or_default(), FoundBy::Label)
        }),
    ]
}

proptest! {
    #[test]
    fn decisions_converge_and_keep_registrations_of_clients(
        lists in proptest::collection::vec(proptest::collection::vec(any_container(), 0..5), 1..6),
        first in proptest::collection::vec(any_registration(), 0..3),
        all: bool,
    ) {
        let mut known = Registered::default();
        for registration in first {
            if known.find(registration.container_name.as_str()).is_none() {
                known.entries.push(Arc::new(registration));
            }
        }
        let own = |known: &Registered| -> Vec<Arc<Registration>> {
            known.entries.iter().filter(|entry| entry.discovered.is_none()).cloned().collect()
        };
        let by_name = |entry: &&Arc<Registration>| {
            entry.discovered.as_ref().is_some_and(|discovered| discovered.by == FoundBy::Name)
        };
        let named = |known: &Registered| known.entries.iter().filter(by_name).count();
        let (own_before, mut named_before) = (own(&known), named(&known));
        for mut listed in lists {
            let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
            listed.retain(|one| ids.insert(one.id.clone()) && names.insert(one.name.clone()));
            // A name that is freed by one decision may be assigned by the next.
            let mut rounds = 0;
            loop {
                let judged = judge(&read(&listed), &known, all);
                prop_assert_eq!(judged.verdicts.len(), listed.len());
                if judged.steps.is_empty() {
                    break;
                }
                for step in &judged.steps {
                    if let Step::Drop(dropped) = step && by_name(&dropped) {
                        // Only one of two registrations of the same container may be dropped.
                        let same = |entry: &&Arc<Registration>| entry.discovered == dropped.discovered;
                        prop_assert!(known.entries.iter().filter(same).count() > 1, "{:?} is lost", dropped);
                        named_before -= 1;
                    }
                }
                apply(&mut known, &judged.steps);
                rounds += 1;
                prop_assert!(rounds < 10, "{:?} does not converge in {:?}", listed, known);
            }
            prop_assert_eq!(own(&known), own_before.clone());
            prop_assert_eq!(named(&known), named_before);
            for entry in known.entries.iter().filter(|entry| is_derived(entry)) {
                let id = entry.discovered.as_ref().and_then(|discovered| discovered.id.clone());
                prop_assert!(listed.iter().any(|one| Some(&one.id) == id.as_ref()), "{:?} has no container", entry);
            }
        }
    }
}
