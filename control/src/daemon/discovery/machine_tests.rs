use super::*;
use crate::docker::Network;
use crate::docker::labels::{ContainerLabels, ImageLabels};
use proptest::prelude::*;

const FORWARD: (&str, &str) = ("dev.landfall.forward", "true");

fn name(text: &str) -> ContainerName {
    ContainerName::new(text).unwrap()
}

/// The labels of a container whose image has no labels.
fn given(labels: &[(&str, &str)]) -> ContainerLabels {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    ContainerLabels::new(labels.collect(), ImageLabels::Known(BTreeMap::new()))
}

/// A container that runs; the older, the smaller its id.
fn container(id: &str, called: &str, labels: &[(&str, &str)]) -> Listed {
    Listed {
        id: id.to_owned(),
        name: name(called),
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

/// Registered by somebody, in this way.
fn registered(called: &str, attach_method: Option<AttachMethod>) -> Registration {
    Registration {
        attach_method,
        discovered: None,
        ..registration(&name(called), &name(called), "", FoundBy::Label)
    }
}

fn attached(called: &str, id: Option<&str>) -> Registration {
    let discovered = Some(Discovered { by: FoundBy::Name, id: id.map(str::to_owned) });
    Registration { discovered, ..registered(called, Some(AttachMethod::DOCKER)) }
}

fn read(listed: &[Listed]) -> Vec<Candidate> {
    listed.iter().map(|container| Candidate::new(container.clone(), &[])).collect()
}

/// The registrations as they are after the steps of a look, and what was decided.
fn after(listed: &[Listed], before: Vec<Registration>, all: bool) -> (Vec<Registration>, Decision) {
    let mut known = Registered { entries: before.into_iter().map(Arc::new).collect() };
    let listed = read(listed);
    let judged = judge(&listed, &known, all);
    apply(&mut known, &judged.steps);
    let again = judge(&listed, &known, all);
    assert_eq!(again.steps, [], "it is a level: {judged:?}");
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

/// Names with Docker's names and ids, for short.
fn in_short(registrations: &[Registration]) -> Vec<(String, String, Option<String>)> {
    let short = |one: &Registration| {
        let id = one.discovered.as_ref().and_then(|discovered| discovered.id.clone());
        (one.container_name.to_string(), one.docker_name().to_string(), id)
    };
    registrations.iter().map(short).collect()
}

fn entry(name: &str, docker: &str, id: &str) -> (String, String, Option<String>) {
    (name.to_owned(), docker.to_owned(), Some(id.to_owned()))
}

fn no(why: NotForwardedReason) -> Verdict {
    Verdict::Not(why)
}

#[test]
fn a_label_has_a_container_forwarded_and_without_one_nobody_asked() {
    let listed = [container("1", "shop", &[FORWARD]), container("2", "db", &[])];
    let (known, judged) = after(&listed, vec![], false);
    assert_eq!(in_short(&known), [entry("shop", "shop", "1")]);
    assert_eq!(
        judged.verdicts,
        [Verdict::Forwarded(name("shop"), FoundBy::Label), no(NotForwardedReason::Unasked)]
    );
    assert_eq!(judged.remarks, []);
}

#[test]
fn all_are_forwarded_but_those_that_say_no_and_our_own() {
    let listed = [
        container("1", "shop", &[]),
        container("2", "db", &[("dev.landfall.forward", "no")]),
        container("3", "landfall-helper-0", &[("dev.landfall.helper", "")]),
        container("4", "odd", &[("dev.landfall.forward", "perhaps")]),
    ];
    let (known, judged) = after(&listed, vec![], true);
    assert_eq!(in_short(&known), [entry("odd", "odd", "4"), entry("shop", "shop", "1")]);
    assert_eq!(judged.verdicts[1..3], [no(NotForwardedReason::Excluded), no(NotForwardedReason::Ours)]);
    assert_eq!(judged.remarks.len(), 1);
    // Without --all, what only that had brought is gone.
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
    assert_eq!(in_short(&known), [entry("web", "x", "3")]);
    let not_own = |origin| no(NotForwardedReason::NotOwn(origin));
    assert_eq!(judged.verdicts[..2], [not_own(LabelOrigin::Image), not_own(LabelOrigin::Unknown)]);
    // What an earlier release registered for such a label ends.
    let before = registration(&name("shop"), &name("shop"), "1", FoundBy::Label);
    assert_eq!(in_short(&after(&listed, vec![before], false).0), [entry("web", "x", "3")]);
    let (known, _) = after(&listed, vec![], true);
    assert_eq!(in_short(&known).len(), 3, "all are forwarded");
}

#[test]
fn labels_choose_name_and_ports() {
    let labels = [FORWARD, ("dev.landfall.name", "web"), ("dev.landfall.allow", "3000")];
    let (known, _) = after(&[container("1", "shop", &labels)], vec![], false);
    assert_eq!(in_short(&known), [entry("web", "shop", "1")]);
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
fn a_list_of_ports_that_cannot_be_read_lets_nothing_out() {
    let listed = [container("1", "shop", &[FORWARD, ("dev.landfall.deny", "ssh")])];
    let (known, judged) = after(&listed, vec![], true);
    assert_eq!(known, []);
    assert!(matches!(&judged.verdicts[..], [Verdict::Not(NotForwardedReason::Unreadable(_))]));
    assert!(judged.remarks[0].text.starts_with("container shop: nothing of it is forwarded, since"));
}

#[test]
fn a_registration_is_made_when_the_container_runs_and_ends_when_it_is_gone() {
    let shop = container("1", "shop", &[FORWARD]);
    let (known, judged) = after(&[stopped(shop.clone())], vec![], false);
    assert_eq!((known.len(), &judged.verdicts[..]), (0, &[no(NotForwardedReason::NotRunning)][..]));
    let (known, _) = after(std::slice::from_ref(&shop), known, false);
    assert_eq!(known.len(), 1);
    let (known, _) = after(&[stopped(shop)], known, false);
    assert_eq!(known.len(), 1, "it may be started again");
    assert_eq!(after(&[], known, false).0, []);
}

#[test]
fn a_container_that_is_made_anew_says_anew_how_it_is_forwarded() {
    let (known, _) = after(&[container("1", "shop", &[FORWARD])], vec![], false);
    let other = [container("2", "shop", &[FORWARD, ("dev.landfall.allow", "80")])];
    let (known, _) = after(&other, known, false);
    assert_eq!(in_short(&known), [entry("shop", "shop", "2")]);
    assert!(known[0].port_forward.is_some());
    assert_eq!(after(&[container("3", "shop", &[])], known, false).0, []);
}

#[test]
fn what_is_labelled_is_known_by_its_new_name_when_it_is_renamed() {
    let (known, _) = after(&[container("1", "shop", &[FORWARD])], vec![], false);
    let (known, judged) = after(&[container("1", "store", &[FORWARD])], known, false);
    assert_eq!(in_short(&known), [entry("store", "store", "1")]);
    let [step @ Step::Move { from, .. }] = &judged.steps[..] else { panic!("{:?}", judged.steps) };
    assert_eq!(from.container_name, name("shop"));
    assert!(step.names().eq([&name("store"), &name("shop")]));
    // Another container is no reason to keep what the one that is gone has.
    let (_, judged) = after(&[container("2", "shop-2", &[FORWARD])], known, false);
    assert!(matches!(&judged.steps[..], [Step::Register { .. }, Step::Drop(_)]), "{:?}", judged.steps);
}

#[test]
fn what_somebody_named_moves_with_its_container() {
    let policy =
        Some(PortForward { deny: Some([std::num::NonZeroU16::MIN].into()), ..PortForward::default() });
    let shop = Registration { port_forward: policy.clone(), ..attached("shop", Some("1")) };
    let (known, judged) = after(&[container("1", "store", &[])], vec![shop], false);
    assert_eq!(in_short(&known), [entry("store", "store", "1")]);
    assert!(matches!(&judged.steps[..], [Step::Move { .. }]), "{:?}", judged.steps);
    assert_eq!(known[0].port_forward, policy);
    assert_eq!(judged.verdicts, [Verdict::Forwarded(name("store"), FoundBy::Name)]);
}

#[test]
fn of_a_move_that_is_half_done_the_other_half_is_left() {
    let before = vec![attached("shop", Some("1")), attached("store", Some("1"))];
    let (known, judged) = after(&[container("1", "store", &[])], before, false);
    assert_eq!(in_short(&known), [entry("store", "store", "1")]);
    assert_eq!((judged.steps.len(), judged.remarks), (1, vec![]));
}

#[test]
fn a_name_of_its_own_stays_when_its_container_is_renamed() {
    let web = Registration {
        attach_method: Some(AttachMethod::Docker { container: Some(name("shop")) }),
        ..attached("web", Some("1"))
    };
    let (known, _) = after(&[container("1", "store", &[])], vec![web], false);
    assert_eq!(in_short(&known), [entry("web", "store", "1")]);
}

#[test]
fn what_somebody_named_is_the_next_container_of_the_name() {
    let (known, _) = after(&[container("2", "shop", &[])], vec![attached("shop", Some("1"))], false);
    assert_eq!(in_short(&known), [entry("shop", "shop", "2")]);
    // Also where the old one is still there under another name.
    let both = [container("1", "shop-old", &[]), container("2", "shop", &[])];
    let (known, _) = after(&both, vec![attached("shop", Some("1"))], false);
    assert_eq!(in_short(&known), [entry("shop", "shop", "2")]);
    let (known, _) = after(&[container("2", "shop", &[])], vec![attached("shop", None)], false);
    assert_eq!(in_short(&known), [entry("shop", "shop", "2")]);
}

#[test]
fn what_somebody_named_is_remembered_without_a_container() {
    let before = vec![attached("shop", Some("1"))];
    let (known, judged) = after(&[], before.clone(), false);
    assert_eq!((known, judged.steps), (before, vec![]));
}

#[test]
fn it_does_not_move_to_a_name_that_stands_for_something_else() {
    let before = vec![attached("shop", Some("1")), registered("store", None)];
    let (known, judged) = after(&[container("1", "store", &[])], before.clone(), false);
    assert_eq!(known, before);
    assert!(judged.remarks[0].text.starts_with("shop is called store by Docker now"));
}

#[test]
fn a_container_that_is_being_replaced_is_what_it_was() {
    let aside = container("1", "shop.landfall-old", &[FORWARD]);
    let before = vec![attached("shop", Some("1"))];
    assert_eq!(after(std::slice::from_ref(&aside), before.clone(), false).0, before);
    let (labelled, _) = after(&[container("1", "shop", &[FORWARD])], vec![], false);
    assert_eq!(after(std::slice::from_ref(&aside), labelled.clone(), false).0, labelled);
    let new = stopped(container("2", "shop", &[FORWARD]));
    let (known, _) = after(&[aside.clone(), new.clone()], before, false);
    assert_eq!(in_short(&known), [entry("shop", "shop", "2")]);
    // The old one is none any more, and the new one is there when it runs.
    let (known, judged) = after(&[aside, Listed { running: true, ..new }], labelled, false);
    assert_eq!(in_short(&known), [entry("shop", "shop", "2")]);
    assert_eq!(judged.remarks, []);
}

#[test]
fn of_two_that_want_one_name_the_holder_keeps_it_then_the_one_that_runs_then_the_older() {
    let web = [FORWARD, ("dev.landfall.name", "web")];
    let (one, two) = (container("1", "one", &web), container("2", "two", &web));
    let (known, judged) = after(&[two.clone(), one.clone()], vec![], false);
    assert_eq!(in_short(&known), [entry("web", "one", "1")]);
    let text = "container two is not forwarded: container one has the name web".to_owned();
    assert_eq!(judged.remarks, [Notice { id: "2".to_owned(), text }]);
    let (known, _) = after(&[stopped(one.clone()), two.clone()], known, false);
    assert_eq!(in_short(&known), [entry("web", "one", "1")]);
    let (known, _) = after(&[stopped(one.clone()), two.clone()], vec![], false);
    assert_eq!(in_short(&known), [entry("web", "two", "2")]);
    let (known, _) = after(&[one, two.clone()], known, false);
    assert_eq!(in_short(&known), [entry("web", "two", "2")]);
    assert_eq!(in_short(&after(&[two], known, false).0), [entry("web", "two", "2")]);
}

#[test]
fn what_somebody_registered_is_left_alone() {
    for attach_method in [None, Some(AttachMethod::DOCKER), Some(AttachMethod::Websocket)] {
        let before = vec![registered("shop", attach_method)];
        let (known, judged) = after(&[container("1", "shop", &[FORWARD])], before.clone(), true);
        assert_eq!(known, before);
        assert_eq!(judged.verdicts, [Verdict::Registered(name("shop"))]);
        assert_eq!(judged.remarks, []);
    }
    let before = vec![registered("shop", Some(AttachMethod::Netns { path: "/n".into() }))];
    let (known, judged) = after(&[container("1", "shop", &[FORWARD])], before.clone(), false);
    assert_eq!(known, before);
    assert!(matches!(&judged.verdicts[..], [Verdict::Not(NotForwardedReason::NameTaken { .. })]));
    assert_eq!(judged.remarks.len(), 1);
}

#[test]
fn attaching_outranks_labels() {
    let listed = [container("1", "shop", &[FORWARD, ("dev.landfall.name", "web")])];
    let (known, _) = after(&listed, vec![attached("shop", Some("1"))], true);
    assert_eq!(in_short(&known), [entry("shop", "shop", "1")]);
    let excluded = [container("1", "shop", &[("dev.landfall.forward", "false")])];
    assert_eq!(after(&excluded, vec![attached("shop", Some("1"))], false).0.len(), 1);
}

fn detached(
    called: &str,
    listed: &[Listed],
    before: &[Registration],
    all: bool,
) -> (Detach, Vec<Registration>) {
    let mut known = Registered { entries: before.iter().cloned().map(Arc::new).collect() };
    let done = detach(&name(called), &read(listed), &known, all);
    if let Detach::Forget(step) | Detach::TurnOff(step) = &done {
        apply(&mut known, std::slice::from_ref(step));
    }
    let known = known.entries.iter().map(|entry| Registration::clone(entry)).collect();
    (done, after(listed, known, all).0)
}

#[test]
fn what_was_attached_is_forgotten_when_it_is_detached() {
    let shop = [container("1", "shop", &[])];
    let (done, known) = detached("shop", &shop, &[attached("shop", Some("1"))], false);
    assert!(matches!(done, Detach::Forget(_)));
    assert_eq!(known, []);
    // Also where Docker has it no more, or cannot be asked.
    assert_eq!(detached("shop", &[], &[attached("shop", Some("1"))], true).1, []);
}

#[test]
fn what_would_come_back_by_itself_is_turned_off() {
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
        // Made anew, it stays off; and when it is gone, that may be forgotten.
        let (known, judged) = after(&[container("2", "shop", &[FORWARD])], known, true);
        assert!(off(&known));
        assert_eq!(judged.verdicts, [Verdict::Off(name("shop"))]);
        assert_eq!(detached("shop", &[], &known, true).1, []);
    }
}

#[test]
fn dockers_name_does_to_detach_it() {
    let shop = [container("1", "shop", &[FORWARD, ("dev.landfall.name", "web")])];
    let (known, _) = after(&shop, vec![], false);
    let (_, known) = detached("shop", &shop, &known, false);
    assert_eq!(in_short(&known), [entry("web", "shop", "1")]);
    assert!(known[0].port_forward.as_ref().unwrap().is_off());
}

#[test]
fn what_is_not_forwarded_by_the_daemon_itself_cannot_be_detached() {
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

/// A container of a few names, labels and ids, so that they meet.
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
        |(id, called, labels, running): (i32, &str, Vec<_>, bool)| Listed {
            running,
            ..container(&id.to_string(), called, &labels)
        },
    )
}

fn any_registration() -> impl Strategy<Value = Registration> {
    let id = || proptest::option::of((0..6).prop_map(|id: i32| id.to_string()));
    let names = || prop_oneof![Just("a"), Just("b"), Just("c")];
    prop_oneof![
        (names(), id()).prop_map(|(called, id)| attached(called, id.as_deref())),
        names().prop_map(|called| registered(called, None)),
        (names(), names(), id()).prop_map(|(called, docker, id)| {
            registration(&name(called), &name(docker), &id.unwrap_or_default(), FoundBy::Label)
        }),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_it_settles_and_nothing_of_anybodys_is_lost(
        moments in proptest::collection::vec(proptest::collection::vec(any_container(), 0..5), 1..6),
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
        for mut listed in moments {
            let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
            listed.retain(|one| ids.insert(one.id.clone()) && names.insert(one.name.clone()));
            // A name that is freed in one look may be given in the next.
            let mut looks = 0;
            loop {
                let judged = judge(&read(&listed), &known, all);
                prop_assert_eq!(judged.verdicts.len(), listed.len());
                if judged.steps.is_empty() {
                    break;
                }
                for step in &judged.steps {
                    if let Step::Drop(dropped) = step && by_name(&dropped) {
                        // Only one of two for the same container.
                        let same = |entry: &&Arc<Registration>| entry.discovered == dropped.discovered;
                        prop_assert!(known.entries.iter().filter(same).count() > 1, "{:?} is lost", dropped);
                        named_before -= 1;
                    }
                }
                apply(&mut known, &judged.steps);
                looks += 1;
                prop_assert!(looks < 10, "{:?} never settles in {:?}", listed, known);
            }
            prop_assert_eq!(own(&known), own_before.clone());
            prop_assert_eq!(named(&known), named_before);
            for entry in known.entries.iter().filter(|entry| is_derived(entry)) {
                let id = entry.discovered.as_ref().and_then(|discovered| discovered.id.clone());
                prop_assert!(listed.iter().any(|one| Some(&one.id) == id.as_ref()), "{:?} is nobody", entry);
            }
        }
    }
}
